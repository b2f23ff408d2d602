"""Bad input: exit code 2 on every rank, one line from rank 0 that names the setting, and nothing left behind."""

import shutil
import time

import pytest

from lora_dist.embedded import BASE_DIR, QUOTES_DIR
from tests.helpers.ranks import PATIENCE_S, ROOT, assert_refused, fork_ranks, launch, start_rank

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def write(path, text):
    path.write_text(text)
    return str(path)


# id: (flags as a function of a temporary folder, environment, what the line must hold)
CASES = {
    "unknown flag": (lambda t: ["--lora_rank", "8"], {}, ["--lora_rank", "no such flag", "--lora_r"]),
    "int4": (lambda t: ["--quantization", "int4"], {}, ["--quantization", "int4", "int8", "nf4", "none"]),
    "not a number": (lambda t: ["--lora_r", "many"], {}, ["--lora_r many", "must be a whole number"]),
    "negative rank": (lambda t: ["--lora_r", "-4"], {}, ["--lora_r -4", "must be 1 or more and at most 65,536"]),
    "dropout of one": (lambda t: ["--lora_dropout", "1.0"], {}, ["--lora_dropout 1.0", "below 1"]),
    "learning rate": (lambda t: ["--learning_rate", "3"], {}, ["--learning_rate 3.0", "1e-30 or more and below 1"]),
    "steps and epochs": (lambda t: ["--max_steps", "3", "--num_train_epochs", "1"], {}, ["exclude each other"]),
    "one step": (lambda t: ["--max_steps", "1"], {}, ["--max_steps 1", "trains nothing", "--warmup_steps 100"]),
    "resident in ddp": (lambda t: ["--resident_layers", "2"], {}, ["--resident_layers 2", "no effect under ddp"]),
    "too many resident": (lambda t: ["--resident_layers", "4"], FSDP, ["--resident_layers 4", "has 4 layers", "all"]),
    "half resident": (
        lambda t: ["--resident_layers", "half"],
        FSDP,
        ["--resident_layers half", "a number, all or auto"],
    ),
    "budget for nothing": (lambda t: ["--memory_budget_gib", "8"], FSDP, ["--memory_budget_gib 8.0", "auto"]),
    "tied head": (lambda t: ["--modules_to_save", "lm_head"], FSDP, ["--modules_to_save lm_head", "is tied"]),
    "cache of nothing": (
        lambda t: ["--quantized_cache", "cache", "--quantization", "none"],
        FSDP,
        ["--quantized_cache cache", "has no effect"],
    ),
    "no hub name": (lambda t: ["--push_to_hub", "true"], {}, ["--push_to_hub", "--hub_model_id"]),
    "config file": (lambda t: ["--config", str(t / "no.yaml")], {}, ["--config", "no.yaml", "No such file"]),
    "typo in config": (
        lambda t: ["--config", write(t / "c.yaml", "lora_rr: 3")],
        {},
        ["c.yaml: lora_rr: no such setting", "--lora_r?"],
    ),
    "no model": (
        lambda t: ["--model_name_or_path", str(t / "none")],
        {},
        ["--model_name_or_path", "no such directory"],
    ),
    "empty model": (lambda t: ["--model_name_or_path", str(t)], {}, ["--model_name_or_path", "holds no config.json"]),
    "no data file": (lambda t: ["--dataset_name", str(t / "no.jsonl")], {}, ["--dataset_name", "no such file"]),
    "no data set": (lambda t: ["--dataset_name", "no/such"], {}, ["--dataset_name no/such", "cannot be loaded"]),
    "broken data": (
        lambda t: ["--dataset_name", write(t / "d.jsonl", '{"quote": "a"}\n{"quo')],
        {},
        ["--dataset_name", "d.jsonl: line 2: Unterminated string"],
    ),
    "column": (lambda t: ["--dataset_text_field", "txt"], {}, ["--dataset_text_field txt", "quote, author, tags"]),
    "column of lists": (
        lambda t: ["--dataset_text_field", "tags"],
        {},
        ["--dataset_name embedded: line 1: column tags holds a list; it must hold text"],
    ),
    "target module": (
        lambda t: ["--lora_target_modules", "q_proj", "query"],
        {},
        ["--lora_target_modules query", "fc1 fc2 k_proj out_proj q_proj v_proj"],
    ),
    "output_dir in a file": (
        lambda t: ["--output_dir", write(t / "file", "") + "/run"],
        {},
        ["--output_dir", "cannot be written"],
    ),
    "fp16 without a GPU": (lambda t: [], {"ACCELERATE_MIXED_PRECISION": "fp16"}, ["mixed_precision: fp16", "bf16"]),
    "ZeRO stage 1": (
        lambda t: ["--deepspeed", write(t / "d.json", '{"zero_optimization": {"stage": 1}}')],
        {},
        ["--deepspeed", "zero_optimization.stage 1", "must be 2 or 3"],
    ),
    "ZeRO key": (
        lambda t: ["--deepspeed", write(t / "d.json", '{"zero_optimization": {"stage": 3, "stage3_live": 1}}')],
        {},
        ["zero_optimization.stage3_live 1", "extra inputs are not permitted"],
    ),
    "another accumulation": (
        lambda t: [
            "--deepspeed",
            write(t / "d.json", '{"zero_optimization": {"stage": 3}, "gradient_accumulation_steps": 8}'),
        ],
        {},
        ["gradient_accumulation_steps 8", "must be 4, the value of --gradient_accumulation_steps"],
    ),
    "pipeline of another size": (
        lambda t: [],
        {"ACCELERATE_USE_MEGATRON_LM": "true", "MEGATRON_LM_PP_DEGREE": "4"},
        ["megatron_lm_pp_degree: 4", "--megatron_lm_pp_degree 2"],
    ),
    "tensor parallel": (
        lambda t: [],
        {"ACCELERATE_USE_MEGATRON_LM": "true", "MEGATRON_LM_TP_DEGREE": "2"},
        ["megatron_lm_tp_degree: 2", "docs/strategies.md"],
    ),
    "bias in a pipeline": (
        lambda t: ["--lora_bias", "all"],
        {"ACCELERATE_USE_MEGATRON_LM": "true", "MEGATRON_LM_PP_DEGREE": "2"},
        ["--lora_bias all", "is not supported under pipeline", "use fsdp"],
    ),
    "prompt for a classifier": (
        lambda t: ["--task_type", "SEQ_CLS", "--dataset_label_field", "tags"],
        {},
        ["--sample_prompt Two things", "is not supported with --task_type SEQ_CLS; give --sample_prompt ''"],
    ),
    "context parallel": (
        lambda t: [],
        {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"},
        ["parallelism_config", "docs/strategies.md"],
    ),
    "fsdp version 1": (lambda t: [], FSDP | {"FSDP_VERSION": "1"}, ["fsdp_version: 1", "fsdp_version: 2"]),
}


PROCESSES = ("unknown flag", "empty model")  # the other cases are forked


@pytest.mark.parametrize("case", CASES)
def test_one_line_from_rank_0_and_exit_code_2_on_both(case, tmp_path):
    flags, env, expected = CASES[case]
    flags = ("--output_dir", str(tmp_path / "run"), *flags(tmp_path))
    before = sorted(tmp_path.iterdir())
    if case in PROCESSES:
        ranks = [start_rank(rank, *flags, env=env) for rank in range(2)]
        outputs = [rank.communicate(timeout=PATIENCE_S) for rank in ranks]
        ended = [(rank.returncode, *output) for rank, output in zip(ranks, outputs, strict=True)]
    else:
        ended = fork_ranks(*flags, env=env)
    assert_refused(ended, expected)
    assert sorted(tmp_path.iterdir()) == before  # nothing was half-written


@pytest.mark.parametrize("recipe", [path.stem for path in sorted((ROOT / "recipes").glob("*.py"))])
def test_every_recipe_refuses_a_chat_template_that_is_not_there(recipe, tmp_path):
    flags = ("--output_dir", str(tmp_path / "run"), "--chat_template", "/nonexistent.jinja")
    ended = fork_ranks(*flags, recipe=recipe)
    assert_refused(ended, ["--chat_template /nonexistent.jinja: No such file or directory"])
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_rank_count_that_the_launcher_did_not_start_is_refused(tmp_path):
    """fsdp on one process, as `--num_processes 1` makes it."""
    done = launch(
        *("accelerate", "launch", "--config_file", "accelerate_configs/fsdp.yaml", "--num_processes", "1"),
        *("recipes/opt_quotes.py", "--output_dir", str(tmp_path / "run")),
    )
    assert done.returncode != 0
    assert "error: accelerate config num_processes: 1: fsdp needs 2 ranks or more" in done.stderr
    assert not (tmp_path / "run").exists()


def test_world_size_without_its_ranks_is_refused(tmp_path):
    """WORLD_SIZE says 2, but no rank was given: accelerate starts one process, which would train alone."""
    done = launch("python", "recipes/opt_quotes.py", "--output_dir", str(tmp_path / "run"), env={"WORLD_SIZE": "2"})
    assert done.returncode == 2
    assert done.stderr.startswith("error: WORLD_SIZE 2: ") and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # torchrun waits half a minute before it kills
def test_a_rank_that_dies_takes_the_others_along(tmp_path):
    """Rank 1 finds other data than rank 0: it leaves, and the launcher ends rank 0 within seconds."""
    data = tmp_path / "data.jsonl"
    shutil.copy(QUOTES_DIR / "test.jsonl", data)
    script = tmp_path / "recipe.py"
    script.write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT / 'recipes')!r})\n"
        "if os.environ['RANK'] == '1': sys.argv += ['--dataset_text_field', 'nothing']\n"
        "import lora_dist, opt_quotes as recipe\n"
        "lora_dist.run_recipe(recipe.main, recipe.CONFIG, gpu=recipe.GPU, embedded=recipe.EMBEDDED, description='')\n"
    )
    started = time.monotonic()
    done = launch(
        *("torchrun", "--nproc_per_node", "2", str(script), "--dataset_name", str(data)),
        *("--output_dir", str(tmp_path / "run"), "--report_to", "none"),
        timeout_s=PATIENCE_S,
    )
    assert done.returncode != 0 and time.monotonic() - started < 60
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize("raised, code", [("None", 0), ("UserError('--x 1: no')", 2)])
def test_nothing_runs_after_a_recipe_is_done(tmp_path, raised, code):
    """Python's shut-down races with gloo's threads and may end a finished run with SIGABRT: it must not begin."""
    script = tmp_path / "recipe.py"
    script.write_text(
        "import atexit, os\n"
        "from lora_dist.config import TrainConfig\n"
        "from lora_dist.entry import run_recipe\n"
        "from lora_dist.errors import UserError\n"
        "def main(config):\n"
        "    atexit.register(os.abort)\n"
        "    print('trained')\n"
        f"    if {raised}: raise {raised}\n"
        "data = {'model_name_or_path': 'embedded', 'dataset_name': 'embedded'}\n"
        "run_recipe(main, TrainConfig(), gpu=data, embedded=data, description='')\n"
    )
    done = launch("python", str(script))
    assert (done.returncode, done.stdout) == (code, "trained\n"), done.stderr


def test_help_names_every_flag_and_exits_0():
    done = launch("python", "recipes/opt_quotes.py", "--help")
    assert done.returncode == 0
    assert all(f"--{name}" in done.stdout for name in ("config", "quantization", "lora_r", "max_steps", "output_dir"))


def test_generate_with_a_folder_that_is_no_adapter():
    done = launch("lora-dist", "generate", "--adapter", str(BASE_DIR), "Hello")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"error: --adapter {BASE_DIR}: holds no adapter_config.json")
