"""--early_stopping_patience ends a run that no longer improves, and --load_best_model_at_end keeps its best adapter."""

import hashlib
import json

from lora_dist.run.folder import RunFolder
from tests.helpers.ranks import fork_ranks

FLAGS = {
    "model_name_or_path": "embedded", "dataset_name": "embedded", "quantization": "int8", "report_to": "none",
    "max_steps": 30, "eval_steps": 1, "save_steps": 1, "save_total_limit": 1, "learning_rate": 0.05, "warmup_steps": 0,
    "lr_scheduler_type": "constant", "max_length": 32, "dataset_test_split": "none", "eval_fraction": 0.02,
    "early_stopping_patience": 3, "load_best_model_at_end": "true",
}  # fmt: skip


def adapter_hash(folder) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_a_run_that_gets_worse_ends_early_with_its_best_adapter_also_after_a_kill(tmp_path):
    folder = RunFolder(tmp_path / "run")
    flags = [word for name, value in {**FLAGS, "output_dir": folder.root}.items() for word in (f"--{name}", str(value))]
    state = None
    for _ in range(2):
        if state:  # as if it had been killed after its last checkpoint and before adapter/
            folder.state.write_text(json.dumps(state | {"status": "running"}))
            for path in folder.adapter.iterdir():
                path.unlink()
        ended = fork_ranks(*flags, strategy="fsdp")
        assert [code for code, _, _ in ended] == [0, 0], ended[0][2]
        state = json.loads(folder.state.read_text())
        summary, losses = state["summary"], {m["train/global_step"]: m["eval/loss"] for m in folder.read_metrics()
                                             if "eval/loss" in m}  # fmt: skip
        best = min((step for step in losses if step), key=losses.get)
        assert state["status"] == "completed" and summary["best_step"] == best
        assert state["step"] == summary["steps"] == best + 3 < 30
        assert summary["eval_loss"] == losses[best] < losses[best + 3]
        assert adapter_hash(folder.adapter) == adapter_hash(folder.checkpoint(best) / "adapter")
        assert adapter_hash(folder.adapter) != adapter_hash(folder.checkpoint(best + 3) / "adapter")
