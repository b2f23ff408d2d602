"""Whatever a launcher, Slurm or a DeepSpeed JSON tells a rank is taken as it says, or refused in one line."""

import dataclasses
import json

from hypothesis import strategies as st

from lora_dist.parallel.strategies import read_launch
from tests.helpers.properties import answered, counts, holds, json_values, mutations, words

NAMES = [
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "OMP_NUM_THREADS",
    "TORCHELASTIC_MAX_RESTARTS", "FSDP_VERSION", "FSDP_RESHARD_AFTER_FORWARD", "FSDP_SHARDING_STRATEGY",
    "FSDP_OFFLOAD_PARAMS", "MEGATRON_LM_TP_DEGREE", "MEGATRON_LM_PP_DEGREE",
]  # fmt: skip
NAMES += [f"ACCELERATE_{name}" for name in (
    "MIXED_PRECISION", "USE_FSDP", "USE_MEGATRON_LM", "USE_DEEPSPEED", "USE_PARALLELISM_CONFIG", "GRADIENT_CLIPPING",
    "GRADIENT_ACCUMULATION_STEPS", "DEEPSPEED_ZERO_STAGE", "DEEPSPEED_CONFIG_FILE", "DEEPSPEED_OFFLOAD_PARAM_DEVICE",
)]  # fmt: skip
VALID = {
    "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}, "bf16": {"enabled": True},
    "gradient_accumulation_steps": "auto", "gradient_clipping": 1.0,
}  # fmt: skip
# What can be in the environment of a process: no NUL.
values = st.one_of(words, st.sampled_from(["true", "false", "0", "1", "2", "3", "auto"])).map(
    lambda word: word.replace("\0", "")
)
values = values.filter(lambda word: all(not "\ud800" <= c <= "\udfff" or "\udc80" <= c <= "\udcff" for c in word))


@counts
def test_any_values_in_the_environment(count, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def check(environment):
        with monkeypatch.context() as patch, answered(tmp_path):
            for name in NAMES:
                patch.delenv(name, raising=False)
            for name, value in environment.items():
                patch.setenv(name, value)
            read_launch(config)

    holds(count, st.dictionaries(st.sampled_from(NAMES), values, max_size=6), check)


@counts
def test_any_bytes_in_a_deepspeed_config(count, config, tmp_path):
    file = tmp_path / "deepspeed.json"
    config = dataclasses.replace(config, deepspeed=str(file))
    sections = st.dictionaries(st.sampled_from([*VALID, "fp16", "comms_logger", "optimizer"]), json_values, max_size=3)
    made = sections.map(lambda changes: json.dumps(VALID | changes).encode())

    def check(content):
        file.write_bytes(content)
        with answered(tmp_path):
            read_launch(config)

    holds(count, st.one_of(made, mutations(json.dumps(VALID).encode()), st.binary(max_size=50)), check)
