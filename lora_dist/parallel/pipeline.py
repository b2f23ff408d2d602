"""The frozen base cut into stages: each rank holds some decoder layers whole, and the base never moves.

Hidden states of a micro-batch go forward through the ranks and gradients go back, one forward then one backward
(PipeDream-Flush, arXiv 2006.09503). Every rank runs the model's own forward on the same micro-batch, so masks,
positions and embeddings come from the model. Layers of other ranks are stand-ins without bytes. The random state
travels with the hidden states, so dropout is drawn as on one rank: the training is the same, bit for bit.

B, T, H: sequences, tokens, hidden size. Stage s is rank s.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from lora_dist.parallel.exact_sum import block
from lora_dist.parallel.fsdp import decoder_layers

# In these families a layer returns a tuple (hidden states, ...), in the others the hidden states.
RETURN_TUPLES = {"bloom", "falcon"}


class StageDone(Exception):
    """Ends a forward after this rank's last layer. Its argument is the layer's output, the hidden states (B, T, H)."""


@dataclass
class Pipeline:
    """One rank's stage of the pipeline."""

    stage: int
    num_stages: int
    layers: range  # indices of this rank's decoder layers
    returns_tuple: bool
    # One group per direction: on a GPU, sends in both directions within one group would wait for each other.
    forward_group: dist.ProcessGroup
    backward_group: dist.ProcessGroup
    inbox_BTH: torch.Tensor | None = None  # hidden states from the previous stage, for the current forward
    random_state: torch.Tensor | None = None  # after the previous stage's last layer
    bytes_sent: int = 0
    pending_sends: list[tuple[dist.Work, torch.Tensor]] = field(default_factory=list)

    @property
    def is_last(self) -> bool:
        return self.stage == self.num_stages - 1

    def send(self, tensor: torch.Tensor, stage: int) -> None:
        """Start to send a tensor to a neighbouring stage, without waiting."""
        # Forget what has arrived, which frees its memory.
        self.pending_sends = [(work, sent) for work, sent in self.pending_sends if not work.is_completed()]
        tensor = tensor.contiguous()
        group = self.forward_group if stage > self.stage else self.backward_group
        self.pending_sends.append((dist.isend(tensor, stage, group=group), tensor))
        self.bytes_sent += tensor.nbytes

    def receive(self, tensor: torch.Tensor, stage: int) -> torch.Tensor:
        """Fill the tensor with what a neighbouring stage sends; waits for it."""
        dist.recv(tensor, stage, group=self.backward_group if stage > self.stage else self.forward_group)
        return tensor

    def wait(self) -> None:
        """Wait until everything that was sent has arrived."""
        for work, _ in self.pending_sends:
            work.wait()
        self.pending_sends.clear()


def remove_other_layers(model: PreTrainedModel, num_stages: int) -> dict[str, nn.Module]:
    """Remove the layers of other stages from a model on meta, so that the loader does not read their weights.

    Returns them by name. In the model an Identity replaces each.
    """
    other_layers, layers = {}, decoder_layers(model)
    own = block(len(layers), num_stages, dist.get_rank())
    for name, module in list(model.named_modules()):
        if module in layers and layers.index(module) not in own:
            other_layers[name] = module
            model.set_submodule(name, nn.Identity())
    return other_layers


def build_stage(
    model: PreTrainedModel, other_layers: dict[str, nn.Module], num_stages: int, device: torch.device
) -> None:
    """Make a loaded model this rank's stage. `other_layers`: what `remove_other_layers` returned. Collective."""
    for name, layer in other_layers.items():
        _free_weights(layer, device)
        model.set_submodule(name, layer)
    layers, rank = decoder_layers(model), dist.get_rank()
    own = block(len(layers), num_stages, rank)
    returns_tuple = model.config.model_type in RETURN_TUPLES
    pipeline = Pipeline(rank, num_stages, own, returns_tuple, dist.new_group(), dist.new_group())
    vars(model)["pipeline"] = pipeline
    for index, layer in enumerate(layers):
        if index not in own:
            # Set on the object and not on its class, so that transformers does not wrap it in checkpointing.
            layer.forward = partial(stand_in_forward, pipeline, index >= own.stop)
    for stage in range(num_stages):
        last = layers[block(len(layers), num_stages, stage).stop - 1]
        last.register_forward_hook(
            lambda layer, args, output, stage=stage: broadcast_output(pipeline, output, stage)
        )  # fmt: skip


def _free_weights(layer: nn.Module, device: torch.device) -> None:
    """Give each parameter its shape on the device, but the memory of a single element."""
    for module in layer.modules():
        for name, param in module.named_parameters(recurse=False):
            empty = torch.zeros((), dtype=param.dtype, device=device).expand(param.shape)
            setattr(module, name, nn.Parameter(empty, requires_grad=False))


def stand_in_forward(pipeline: Pipeline, comes_after: bool, hidden_states_BTH: torch.Tensor, *args, **kwargs):
    """The forward of another rank's decoder layer on this rank. `comes_after`: it comes after this rank's layers.

    In training it starts this rank's layers with the hidden states from the previous stage, or ends the forward with
    StageDone. Without gradients it returns its input: `broadcast_output` then replaces a stage's output.
    """
    if torch.is_grad_enabled():
        if comes_after:
            raise StageDone(hidden_states_BTH)
        hidden_states_BTH = pipeline.inbox_BTH
        # Set here and not before the forward, because the embeddings may have drawn random numbers (GPT-2's dropout).
        set_random_state(pipeline.random_state, hidden_states_BTH.device)
    return (hidden_states_BTH,) if pipeline.returns_tuple else hidden_states_BTH


def broadcast_output(pipeline: Pipeline, output, stage: int):
    """Without gradients (evaluation, generation), give all ranks a stage's output, so that each gets the logits.

    A forward hook on a stage's last layer. Does nothing in training. Collective without gradients.
    """
    assert isinstance(output, tuple) == pipeline.returns_tuple
    if torch.is_grad_enabled():
        return None
    hidden_states_BTH = output[0] if pipeline.returns_tuple else output
    received_BTH = hidden_states_BTH.contiguous() if stage == pipeline.stage else torch.empty_like(hidden_states_BTH)
    dist.broadcast(received_BTH, stage)
    return (received_BTH, *output[1:]) if pipeline.returns_tuple else received_BTH


def pipeline_of(model: nn.Module) -> Pipeline | None:
    """The pipeline of a base, with or without adapters; None if it is not cut into stages."""
    return next((vars(module)["pipeline"] for module in model.modules() if "pipeline" in vars(module)), None)


def schedule(num_micro_batches: int, stage: int, num_stages: int) -> Iterator[tuple[str, int]]:
    """("forward" or "backward", index of the micro-batch) in the order in which this stage computes them.

    At most num_stages - stage micro-batches wait for their backward at the same time.
    """
    num_warmup = min(num_stages - 1 - stage, num_micro_batches)
    for index in range(num_warmup):
        yield "forward", index
    for index in range(num_micro_batches - num_warmup):
        yield "forward", num_warmup + index
        yield "backward", index
    for index in range(num_micro_batches - num_warmup, num_micro_batches):
        yield "backward", index


def random_state(device: torch.device) -> torch.Tensor:
    """The state that dropout on this device draws from: uint8, on the CPU."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_random_state(state: torch.Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state.cpu(), device)
    else:
        torch.set_rng_state(state.cpu())


def send_to_next_stage(pipeline: Pipeline, hidden_states_BTH: torch.Tensor) -> None:
    """Send the bytes of the hidden states, followed by the random state, in one message."""
    state = random_state(hidden_states_BTH.device).to(hidden_states_BTH.device)
    hidden_bytes = hidden_states_BTH.detach().reshape(-1).view(torch.uint8)
    pipeline.send(torch.cat([hidden_bytes, state]), pipeline.stage + 1)


def receive_from_previous_stage(
    pipeline: Pipeline, shape_BTH: torch.Size, dtype: torch.dtype, device: torch.device
) -> None:
    """Receive `inbox_BTH`, a leaf of autograd, and `random_state`. Does nothing on the first stage."""
    if pipeline.stage == 0:
        return
    num_bytes = shape_BTH.numel() * dtype.itemsize
    message = torch.empty(num_bytes + random_state(device).numel(), dtype=torch.uint8, device=device)
    pipeline.receive(message, pipeline.stage - 1)
    pipeline.inbox_BTH = message[:num_bytes].view(dtype).view(shape_BTH).requires_grad_()
    # Cloned: a view may lie at an odd address, with which torch.set_rng_state crashes (torch 2.13).
    pipeline.random_state = message[num_bytes:].clone()
