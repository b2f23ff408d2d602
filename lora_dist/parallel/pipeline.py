"""The frozen base cut into stages: each rank holds some decoder layers whole, and the base never moves.

A micro-batch goes forward through the ranks and its gradient back, one forward one backward (PipeDream-Flush, arXiv
2006.09503). Every rank runs the model's own forward on the same micro-batch, so masks, positions and embeddings come
from the model; layers that are elsewhere stand in its list without bytes. With the hidden states goes the random state,
so dropout is drawn as on one rank: the training is the same, bit for bit.

B, T, H: sequences, tokens, hidden size. Stage s is rank s.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from lora_dist.parallel.exact_sum import block
from lora_dist.parallel.fsdp import decoder_layers

# Their layers return (hidden states, ...), the others' the hidden states.
RETURN_TUPLES = {"bloom", "falcon"}


class StageDone(Exception):
    """Ends a forward after this rank's last layer; carries its output."""


@dataclass
class Pipeline:
    """One rank's place in the pipeline."""

    stage: int
    num_stages: int
    layers: range  # indices of this rank's decoder layers
    returns_tuple: bool
    inbox_BTH: torch.Tensor | None = None  # what the stage before sent, for the forward under way
    random_state: torch.Tensor | None = None  # and the state after its last layer
    bytes_sent: int = 0

    def __post_init__(self):
        # One group a direction: on a GPU, sends both ways in one group would wait for each other.
        self.onward, self.back = dist.new_group(), dist.new_group()
        self.pending: list[tuple[dist.Work, torch.Tensor]] = []

    @property
    def is_last(self) -> bool:
        return self.stage == self.num_stages - 1

    def send(self, tensor: torch.Tensor, stage: int) -> None:
        self.pending = [(work, sent) for work, sent in self.pending if not work.is_completed()]  # frees their memory
        tensor = tensor.contiguous()
        group = self.onward if stage > self.stage else self.back
        self.pending.append((dist.isend(tensor, stage, group=group), tensor))
        self.bytes_sent += tensor.nbytes

    def receive(self, tensor: torch.Tensor, stage: int) -> torch.Tensor:
        dist.recv(tensor, stage, group=self.back if stage > self.stage else self.onward)
        return tensor

    def wait(self) -> None:
        for work, _ in self.pending:
            work.wait()
        self.pending.clear()


def pass_on(pipeline: Pipeline, comes_after: bool, hidden_states_BTH: torch.Tensor, *args, **kwargs):
    """The forward of a decoder layer that another rank holds, before or after this rank's."""
    if torch.is_grad_enabled():  # in a step of the schedule; else `share` comes next
        if comes_after:
            raise StageDone(hidden_states_BTH)
        hidden_states_BTH = pipeline.inbox_BTH
        set_random_state(pipeline.random_state, hidden_states_BTH.device)  # the embeddings may have drawn
    return (hidden_states_BTH,) if pipeline.returns_tuple else hidden_states_BTH


def set_aside(model: PreTrainedModel, num_stages: int) -> dict[str, nn.Module]:
    """Take the layers of other ranks out of a model on meta, so that the loader reads none of their weights."""
    aside, layers = {}, decoder_layers(model)
    own = block(len(layers), num_stages, dist.get_rank())
    for name, module in list(model.named_modules()):
        if module in layers and layers.index(module) not in own:
            aside[name] = module
            model.set_submodule(name, nn.Identity())
    return aside


def put_back(model: PreTrainedModel, aside: dict[str, nn.Module], num_stages: int, device: torch.device) -> None:
    """Stand the layers of other ranks in their places again, without bytes, and make the model a stage."""
    for name, layer in aside.items():
        for module in layer.modules():
            for param_name, param in module.named_parameters(recurse=False):
                empty = torch.zeros((), dtype=param.dtype, device=device).expand(param.shape)
                setattr(module, param_name, nn.Parameter(empty, requires_grad=False))
        model.set_submodule(name, layer)
    layers, rank = decoder_layers(model), dist.get_rank()
    own = block(len(layers), num_stages, rank)
    pipeline = Pipeline(rank, num_stages, own, model.config.model_type in RETURN_TUPLES)
    vars(model)["pipeline"] = pipeline
    for index, layer in enumerate(layers):
        if index not in own:
            layer.forward = partial(pass_on, pipeline, index >= own.stop)  # on the object: never checkpointed
    for stage in range(num_stages):
        end = block(len(layers), num_stages, stage).stop - 1
        layers[end].register_forward_hook(lambda layer, args, output, stage=stage: share(pipeline, output, stage))


def pipeline_of(model: nn.Module) -> Pipeline | None:
    """The pipeline of a base, or of an adapter's model on it; None where it is not cut into stages."""
    return next((vars(module)["pipeline"] for module in model.modules() if "pipeline" in vars(module)), None)


def share(pipeline: Pipeline, output, stage: int):
    """Without gradients (evaluation, generation) all ranks go on with a stage's output: each ends with the logits."""
    assert isinstance(output, tuple) == pipeline.returns_tuple
    if torch.is_grad_enabled():
        return None
    hidden_states_BTH = output[0] if pipeline.returns_tuple else output
    shared_BTH = hidden_states_BTH.contiguous() if stage == pipeline.stage else torch.empty_like(hidden_states_BTH)
    dist.broadcast(shared_BTH, stage)
    return (shared_BTH, *output[1:]) if pipeline.returns_tuple else shared_BTH


def schedule(num_micro_batches: int, stage: int, num_stages: int) -> Iterator[tuple[str, int]]:
    """("forward" or "backward", micro-batch) in order: at most num_stages - stage forwards wait for their backward."""
    ahead = min(num_stages - 1 - stage, num_micro_batches)
    for index in range(ahead):
        yield "forward", index
    for index in range(num_micro_batches - ahead):
        yield "forward", ahead + index
        yield "backward", index
    for index in range(num_micro_batches - ahead, num_micro_batches):
        yield "backward", index


def random_state(device: torch.device) -> torch.Tensor:
    """uint8, on the CPU: the state that dropout on the device draws from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_random_state(state: torch.Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state.cpu(), device)
    else:
        torch.set_rng_state(state.cpu())


def send_onward(pipeline: Pipeline, hidden_states_BTH: torch.Tensor) -> None:
    state = random_state(hidden_states_BTH.device).to(hidden_states_BTH.device)
    numbers = hidden_states_BTH.detach().reshape(-1).view(torch.uint8)
    pipeline.send(torch.cat([numbers, state]), pipeline.stage + 1)


def receive_from_before(pipeline: Pipeline, shape_BTH: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
    """Fill the inbox, a leaf of autograd; nothing on the first stage."""
    if pipeline.stage == 0:
        return
    num_bytes = shape_BTH.numel() * dtype.itemsize
    message = torch.empty(num_bytes + random_state(device).numel(), dtype=torch.uint8, device=device)
    pipeline.receive(message, pipeline.stage - 1)
    pipeline.inbox_BTH = message[:num_bytes].view(dtype).view(shape_BTH).requires_grad_()
    pipeline.random_state = message[num_bytes:].clone()  # a view may lie at an odd address, which torch does not take
