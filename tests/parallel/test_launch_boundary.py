"""The variables that launchers and Slurm set for a rank: read, or refused with one line that names them."""

import pytest

from lora_dist.errors import UserError
from lora_dist.parallel.fsdp import check_fsdp_variables
from lora_dist.parallel.strategies import check_rank_variables, read_launch

NO_COUNTS = ("", "x", "-1", "1.5", "1e3", "9" * 5000, " 1", "\u0663", "a[$(touch MARK)]", "1\n2")
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
PIPELINE = {"ACCELERATE_USE_MEGATRON_LM": "true", "MEGATRON_LM_PP_DEGREE": "2"}


@pytest.fixture(autouse=True)
def two_ranks(monkeypatch):
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")


def set_all(monkeypatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("value", NO_COUNTS, ids=lambda value: ascii(value)[:20])
@pytest.mark.parametrize(
    "name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "OMP_NUM_THREADS"]
)
def test_the_place_of_a_rank_must_be_a_number(config, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    for read in (check_rank_variables, lambda: read_launch(config)):
        with pytest.raises(UserError) as error:
            read()
        assert str(error.value).startswith(f"{name} ") and str(error.value).isprintable()
        assert len(str(error.value)) < 250


def test_a_rank_that_cannot_be_is_refused(monkeypatch):
    check_rank_variables()
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(UserError, match="^RANK 2: must be below WORLD_SIZE 2"):
        check_rank_variables()


@pytest.mark.parametrize("value", NO_COUNTS, ids=lambda value: ascii(value)[:20])
@pytest.mark.parametrize("degree", ["tp", "pp"])
def test_the_degrees_of_a_pipeline_must_be_numbers(config, monkeypatch, degree, value):
    set_all(monkeypatch, PIPELINE | {f"MEGATRON_LM_{degree.upper()}_DEGREE": value})
    with pytest.raises(UserError, match=f"^accelerate config megatron_lm_{degree}_degree: ") as error:
        read_launch(config)
    assert str(error.value).isprintable()


def test_a_version_of_fsdp_that_is_not_set_is_said_so(config, monkeypatch):
    set_all(monkeypatch, {"ACCELERATE_USE_FSDP": "true"})
    monkeypatch.delenv("FSDP_VERSION", raising=False)
    with pytest.raises(UserError, match="^accelerate config fsdp_version: none, which means 1: is not supported"):
        read_launch(config)
    monkeypatch.setenv("FSDP_VERSION", "x")
    with pytest.raises(UserError, match="^accelerate config fsdp_version: x: is not supported"):
        read_launch(config)


@pytest.mark.parametrize(
    "variable", ["FSDP_BACKWARD_PREFETCH", "FSDP_OFFLOAD_PARAMS", "FSDP_STATE_DICT_TYPE", "FSDP_AUTO_WRAP_POLICY"]
)
def test_other_variables_of_fsdp_are_read_before_anything_begins(monkeypatch, variable):
    set_all(monkeypatch, FSDP)
    check_fsdp_variables()
    monkeypatch.setenv(variable, "garbage")
    with pytest.raises(UserError, match="^accelerate config fsdp_config: ") as error:
        check_fsdp_variables()
    assert "\n" not in str(error.value)
