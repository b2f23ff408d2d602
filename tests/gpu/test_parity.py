"""On one GPU: our quantized linears compute what bitsandbytes' own do. Run with pytest -m gpu tests/gpu."""

import dataclasses

import pytest
import torch

from lora_dist.library import load_base
from lora_dist.model.adapters import add_adapters
from lora_dist.model.quantization import FORMATS
from tests.helpers.families import make_checkpoint
from tests.helpers.parity import load_unsharded, loss_and_gradients, randomize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("quantization", [*FORMATS, "none"])
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_loss_and_gradients_equal_bitsandbytes(config, tmp_path, family, quantization, dtype):
    config = dataclasses.replace(config, lora_target_modules=["all-linear"])
    path = make_checkpoint(family, tmp_path)
    outcomes = []
    for model in (
        load_base(str(path), quantization=quantization, dtype=dtype, device=GPU, shard_ranks=1),
        load_unsharded(quantization, dtype, path, GPU),
    ):
        model = add_adapters(model, config)
        randomize(model)
        outcomes.append(loss_and_gradients(model, GPU))
    (loss, gradients), (their_loss, their_gradients) = outcomes
    assert torch.equal(loss, their_loss)
    assert [name for name, g in gradients.items() if not torch.equal(g, their_gradients[name])] == []
