"""The base of `load_base` under the unmodified trainers of transformers and TRL, on 2 ranks, against bitsandbytes' own.

Most of these losses are means over all rows of a step, so the reference is one process. ORPO's, GRPO's and those of
packed rows are means over each rank's, so the reference is as many ranks, each with a whole base.
"""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.ranks import run_ranks
from tests.helpers.trainers import NUM_STEPS, Case, train

TOLERANCE = 2e-6
PER_RANK = ("ORPOTrainer", "GRPOTrainer")
GRADIENTS = {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}
EVALUATION = {"eval_strategy": "steps", "eval_steps": 2}
slow = pytest.mark.slow
CASES = {
    "Trainer": Case("Trainer", "int8"),
    "SFT": Case("SFTTrainer"),
    "DPO": Case("DPOTrainer"),
    "Trainer nf4": Case("Trainer"),
    "SFT int8": Case("SFTTrainer", "int8"),
    "SFT packed": Case("SFTTrainer", "int8", settings={"packing": True, "max_length": 48}),
    "DPO int8": Case("DPOTrainer", "int8"),
    "DPO, a second adapter as the reference": Case("DPOTrainer", reference_adapter=True),
    "KTO": Case("KTOTrainer"),
    "KTO int8": Case("KTOTrainer", "int8"),
    "ORPO": Case("ORPOTrainer"),
    "ORPO int8": Case("ORPOTrainer", "int8"),
    "reward": Case("RewardTrainer"),
    "reward int8": Case("RewardTrainer", "int8"),
    "GRPO": Case("GRPOTrainer"),
    "GRPO int8": Case("GRPOTrainer", "int8"),
    "not quantized": Case("DPOTrainer", "none"),
    "checkpointing and accumulation": Case("Trainer", "int8", settings=GRADIENTS),
    "checkpointing and accumulation, SFT": Case("SFTTrainer", settings=GRADIENTS),
    "checkpointing and accumulation, DPO": Case("DPOTrainer", settings=GRADIENTS),
    "evaluation": Case("Trainer", "int8", settings=EVALUATION),
    "evaluation, SFT": Case("SFTTrainer", settings=EVALUATION),
    "evaluation, DPO": Case("DPOTrainer", settings=EVALUATION),
    "evaluation, KTO": Case("KTOTrainer", settings=EVALUATION),
    "evaluation, reward": Case("RewardTrainer", settings=EVALUATION),
    "as on GPUs": Case("Trainer", "int8", as_on_gpus=True),
    "a resident layer": Case("Trainer", base={"resident_layers": 1}),
}
FAST = ("as on GPUs", "DPO", "checkpointing and accumulation, SFT")


def is_sharded(ended: list[dict], case: Case) -> bool:
    """True if the ranks were one world, each held about half of the base all the time, and they gathered it."""
    held = [rank["held"] for rank in ended]
    whole = ended[0]["whole"]
    share = 0.8 if case.base else 0.51
    return (
        [rank["world"] for rank in ended] == [2, 2]
        and all(0.4 * whole < before <= share * whole and before == after for before, after in held)
        and all(rank["gathered"] > NUM_STEPS * whole / 2 for rank in ended)
        and all("DTensor" in rank["kinds"] for rank in ended)
    )


def assert_same_adapters(ended: list[dict]) -> None:
    for name, weight in ended[0]["adapter"].items():
        assert weight.dtype == torch.float32 and torch.equal(weight, ended[1]["adapter"][name])


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in FAST else slow) for name in CASES])
def test_the_losses_are_those_of_bitsandbytes_own_model(name, tmp_path):
    case = CASES[name]
    ended = run_ranks(train, 2, case, tmp_path)
    assert is_sharded(ended, case), ended
    assert_same_adapters(ended)
    evaluates = "eval_steps" in case.settings  # bitsandbytes' own model cannot on a CPU: it adds to a leaf in place
    reference = replace(case, ours=evaluates, base={}, as_on_gpus=False)
    is_per_rank = case.trainer in PER_RANK or case.settings.get("packing")
    expected = run_ranks(train, 2 if is_per_rank else 1, reference, tmp_path)[0]
    losses = ended[0]["losses"]
    assert expected["gathered"] == 0 and expected["kinds"].isdisjoint({"DTensor"})
    assert len(losses) == NUM_STEPS and len(set(losses)) == NUM_STEPS
    assert losses == pytest.approx(expected["losses"], abs=TOLERANCE, rel=0)
    assert len(expected["eval_losses"]) == (2 if evaluates else 0)
    # Relative: the second one is of the last step's weights, which the losses above do not show yet.
    assert ended[0]["eval_losses"] == pytest.approx(expected["eval_losses"], abs=0, rel=TOLERANCE)


RESUMED = ["Trainer", *(pytest.param(f"{name}Trainer", marks=slow) for name in ("SFT", "DPO", "KTO", "Reward"))]


@pytest.mark.parametrize("trainer", RESUMED)
def test_a_checkpoint_of_trainer_continues_on_the_same_and_on_another_number_of_ranks(trainer, tmp_path):
    case = Case(trainer, settings={"save_strategy": "steps", "save_steps": 2, "warmup_steps": 2})
    through = run_ranks(train, 2, case, tmp_path)
    again = replace(case, resume=str(tmp_path / "checkpoint-2"))
    for ranks in (2, 1):
        resumed = run_ranks(train, ranks, again, tmp_path / f"on-{ranks}")
        assert resumed[0]["losses"] == pytest.approx(through[0]["losses"], abs=TOLERANCE, rel=0)
        for name, weight in resumed[0]["adapter"].items():
            assert torch.allclose(weight, through[0]["adapter"][name], atol=0 if ranks == 2 else 1e-5, rtol=0)
    saved = load_file(tmp_path / "checkpoint-4/adapter_model.safetensors")
    adapter = {
        name.replace(".modules_to_save", "").replace(".default", ""): weight
        for name, weight in through[0]["adapter"].items()
    }
    assert saved.keys() == adapter.keys()  # an ordinary adapter of PEFT: no weight of the base is in it
    assert all(torch.equal(saved[name], adapter[name]) for name in saved)


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    settings = EVALUATION | {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True, "max_steps": 4}
    ended = run_ranks(train, 2, Case("Trainer", "int8", settings=settings | {"learning_rate": 0.5}), tmp_path)
    losses = ended[0]["eval_losses"]
    assert len(losses) == 2 and losses == ended[1]["eval_losses"]
    best = 2 * (losses.index(min(losses)) + 1)
    assert ended[0]["best"] == str(tmp_path / f"checkpoint-{best}")
    saved = load_file(tmp_path / f"checkpoint-{best}/adapter_model.safetensors")
    for name, weight in ended[1]["adapter"].items():
        assert torch.equal(weight, saved[name.replace(".default", "")])
