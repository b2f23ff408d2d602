"""Shared by all tests: no network, no accelerator needed, one thread a process as on the ranks."""

import os
import tempfile

_cache = tempfile.TemporaryDirectory(prefix="lora-dist-tests-")  # rows of an older encoding would pass for today's
os.environ.update(HF_DATASETS_CACHE=_cache.name)
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
os.environ.pop("WANDB_API_KEY", None)

import pytest  # noqa: E402
import torch  # noqa: E402
from tqdm.std import TqdmDefaultWriteLock  # noqa: E402

from lora_dist.config import TrainConfig  # noqa: E402

torch.set_num_threads(1)
# tqdm's lock would be shared by all forks of this process: a rank that a test kills while it holds it would stop the
# ranks of later tests for good. Without this part of it, each fork has a lock of its own.
TqdmDefaultWriteLock.mp_lock = None


@pytest.fixture
def config() -> TrainConfig:
    """A valid config on the embedded base and data."""
    return TrainConfig(model_name_or_path="embedded", dataset_name="embedded", dataset_text_field="quote", max_steps=4)
