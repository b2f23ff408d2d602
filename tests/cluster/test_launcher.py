"""`lora-dist train`: its words, the ranks it starts, the signals it passes on, and its exit code."""

import json
import os
import signal
import subprocess
import time

import pytest
import torch
import yaml

from lora_dist.cluster import launcher
from lora_dist.cluster.launcher import TrainCommand, plan_ranks, read_command, train
from lora_dist.environment import shipped
from lora_dist.errors import UserError
from lora_dist.run.folder import RunFolder
from tests.helpers.ranks import BIN, PATIENCE_S, ROOT, wait_for_step

# A recipe that trains nothing: each rank runs BODY.
RECIPE = """
import json, os, signal, sys, time
from pathlib import Path
import lora_dist
CONFIG = lora_dist.TrainConfig()
GPU = EMBEDDED = {"model_name_or_path": "embedded", "dataset_name": "embedded"}
FOLDER = Path(__file__).parent
def main(config): pass
if __name__ == "__main__":
    rank = int(os.environ.get("RANK", "0"))
    BODY
"""


@pytest.fixture
def recipe(tmp_path):
    def write(body: str) -> str:
        path = tmp_path / "recipe.py"
        path.write_text(RECIPE.replace("BODY", body.replace("\n", "\n    ")))
        return str(path)

    return write


def refusal(*words: str) -> str:
    with pytest.raises(UserError) as error:
        read_command(list(words))
    assert "\n" not in str(error.value)
    return str(error.value)


def start(recipe: str, *words: str, **how) -> subprocess.Popen:
    return subprocess.Popen([f"{BIN}/lora-dist", "train", recipe, *words], cwd=ROOT, text=True, **how)


def wait_for(files: list) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, f"not there: {files}"
        time.sleep(0.05)


def test_options_may_stand_before_or_after_the_recipe():
    flags = ["--max_steps", "3", "--lora_target_modules", "q_proj", "v_proj"]
    expected = TrainCommand(shipped("recipes") / "sft.py", flags, "fsdp", 4)
    options = ["--config_file", "fsdp", "--num_processes=4"]
    assert read_command([*options, "sft", *flags]) == read_command(["sft", *flags, *options]) == expected


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("", "recipe: none is given; the command is lora-dist train RECIPE, e.g. lora-dist train sft"),
        ("sfx", "recipe sfx: no such recipe; did you mean sft?"),
        (
            "zzz",
            "recipe zzz: no such recipe; give one of bloomz_complaints dpo opt_quotes quotes_tags sft, or a .py file",
        ),
        ("no.py", "recipe no.py: no such file; the names of those that ship are bloomz_complaints dpo opt_quotes"),
        ("--max_steps 3 sft", "--max_steps: comes before the recipe; the command is lora-dist train RECIPE"),
        ("sft --num_processes many", "--num_processes many: must be a whole number, 1 or more"),
        ("sft --num_processes 100000000", "--num_processes 100000000: must be a whole number, 1 or more and at most"),
        ("sft --num_processes 0", "--num_processes 0: must be a whole number, 1 or more"),
        ("sft --config_file", "--config_file: needs a value"),
        ("sft --config_file fspd", "--config_file fspd: no such accelerate config; did you mean fsdp?"),
        ("sft --config_file no.yaml", "--config_file no.yaml: no such file; the names of those that ship are ddp fsdp"),
        ("sft --lr 3", "--lr: no such flag; use --learning_rate"),
        ("sft --lora_r 0", "--lora_r 0: must be 1 or more"),
    ],
)
def test_bad_words_are_one_line_before_any_rank_is_started(words, line):
    assert refusal(*words.split()).startswith(line)


def test_help_of_a_recipe_names_the_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        read_command(["sft", "--help"])
    assert capsys.readouterr().out.startswith("usage: lora-dist train sft [--config FILE.yaml]")


@pytest.mark.parametrize(
    ("num_gpus", "config_file", "num_processes", "expected"),
    [
        (0, None, None, (2, "fsdp")),
        (8, None, None, (8, "fsdp")),
        (1, None, None, (1, "single")),
        (0, None, 1, (1, "single")),
        (8, "ddp", None, (8, "ddp")),
        (8, "single", None, (1, "single")),
        (0, "zero3", 3, (3, "zero3")),
        (8, "own", None, (4, "own")),
        (8, "own", 2, (2, "own")),
    ],
)
def test_how_many_ranks(tmp_path, monkeypatch, num_gpus, config_file, num_processes, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    if config_file == "own":
        config_file = str(tmp_path / "own.yaml")
        (tmp_path / "own.yaml").write_text("distributed_type: MULTI_GPU\nnum_processes: 4\n")
    num_ranks, file = plan_ranks(TrainCommand(ROOT / "recipes/sft.py", [], config_file, num_processes))
    assert (num_ranks, file.stem) == expected


def test_too_many_ranks_and_several_machines_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="^--num_processes 4: this machine has 2 GPU"):
        plan_ranks(TrainCommand(ROOT / "recipes/sft.py", [], None, 4))
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump({"distributed_type": "FSDP", "num_machines": 2, "num_processes": 4}))
    with pytest.raises(UserError, match="num_machines: 2: lora-dist train starts one machine's ranks"):
        plan_ranks(TrainCommand(ROOT / "recipes/sft.py", [], str(file), None))


def test_the_ranks_meet_and_each_knows_its_place(recipe, tmp_path):
    body = """import torch.distributed as dist
dist.init_process_group("gloo")
ranks = [None, None, None]
dist.all_gather_object(ranks, (rank, os.environ["LOCAL_RANK"], os.environ["FSDP_VERSION"], sys.argv[1:]))
(FOLDER / f"{rank}.json").write_text(json.dumps(ranks))
os._exit(0)  # as recipes end: gloo's threads may end a process that shuts down with SIGABRT"""
    assert train([recipe(body), "--num_processes", "3", "--max_steps", "7"]) == 0
    expected = [[rank, str(rank), "2", ["--max_steps", "7"]] for rank in range(3)]
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)] == [expected] * 3


def test_one_process_is_started_as_accelerate_does(recipe, tmp_path):
    names = ("RANK", "WORLD_SIZE", "MASTER_PORT", "ACCELERATE_USE_FSDP")
    body = f"(FOLDER / 'env').write_text(str([n for n in {names} if n in os.environ]))"
    assert train([recipe(body), "--num_processes", "1"]) == 0
    assert (tmp_path / "env").read_text() == "[]"


@pytest.mark.parametrize(
    ("body", "code", "line"),
    [
        ("sys.exit(2)", 2, ""),
        ("sys.exit(1 if rank else 0)", 1, ""),
        ("os.kill(os.getpid(), signal.SIGKILL) if rank else time.sleep(1); sys.exit(rank)", 137, "rank 1 was ended by"),
        # The first to fail counts: the others fail because of it.
        ("time.sleep(0 if rank else 1); sys.exit(2 if rank else 1)", 2, ""),
    ],
)
def test_the_exit_code_is_that_of_the_ranks(recipe, capfd, body, code, line):
    assert train([recipe(body)]) == code
    err = capfd.readouterr().err
    assert line in err and err.count("\n") == bool(line)


def test_no_rank_is_left_if_one_fails_and_what_it_said_is_printed(recipe, tmp_path, capfd, monkeypatch):
    """Rank 1 finds bad input that rank 0 does not see; rank 0 waits for it, and cannot print its line."""
    monkeypatch.setattr(launcher, "GRACE_S", 1.0)
    body = """from lora_dist.entry import end_process
def work():
    if rank: raise lora_dist.UserError("--dataset_name x: no such file")
    (FOLDER / "pid").write_text(str(os.getpid()))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(30)
end_process(work)"""
    assert train([recipe(body)]) == 2
    assert capfd.readouterr().err == "error: --dataset_name x: no such file\n"
    assert not os.path.exists(f"/proc/{(tmp_path / 'pid').read_text()}")


COUNT_SIGNALS = """got = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: got.append(int(number)))
(FOLDER / f"ready{rank}").touch()
while not got: time.sleep(0.01)
time.sleep(0.5)
(FOLDER / f"got{rank}").write_text(json.dumps(got))"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_each_rank_once(recipe, tmp_path, number):
    process = start(recipe(COUNT_SIGNALS), stderr=subprocess.PIPE, start_new_session=True)
    wait_for([tmp_path / "ready0", tmp_path / "ready1"])
    os.killpg(process.pid, number)  # as a terminal sends Ctrl-C: to all processes of the group
    _, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, err) == (0, "")
    assert [json.loads((tmp_path / f"got{rank}").read_text()) for rank in range(2)] == [[number]] * 2


def test_ranks_are_asked_to_stop_if_the_launcher_is_killed(recipe, tmp_path):
    process = start(recipe(f"from lora_dist.entry import stop_with_launcher; stop_with_launcher()\n{COUNT_SIGNALS}"))
    wait_for([tmp_path / "ready0", tmp_path / "ready1"])
    process.kill()
    process.wait()
    wait_for([tmp_path / "got0", tmp_path / "got1"])
    time.sleep(0.1)
    # The kernel sends it once for each thread of the launcher that ends later: once or twice was seen.
    assert set(json.loads((tmp_path / "got0").read_text())) == {signal.SIGTERM}


TICK = """import itertools
for i in itertools.count():
    (FOLDER / f"tick{rank}").write_text(str(i))
    if (FOLDER / "end").exists(): break
    time.sleep(0.02)"""


def test_ctrl_z_stops_the_ranks_too(recipe, tmp_path):
    def ticks() -> list[str]:
        return [(tmp_path / f"tick{rank}").read_text() for rank in range(2)]

    process = start(recipe(TICK), stderr=subprocess.PIPE)
    wait_for([tmp_path / "tick0", tmp_path / "tick1"])
    process.send_signal(signal.SIGTSTP)  # as a terminal sends it: to the launcher's group, in which no rank is
    assert os.waitpid(process.pid, os.WUNTRACED)[1] == signal.SIGSTOP << 8 | 0x7F
    stopped = ticks()
    time.sleep(0.3)
    assert ticks() == stopped
    process.send_signal(signal.SIGCONT)
    deadline = time.monotonic() + PATIENCE_S
    while not all(now and now != then for now, then in zip(ticks(), stopped, strict=True)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (tmp_path / "end").touch()
    _, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, err) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["lora-dist", "torchrun"])
def test_a_run_whose_launcher_is_killed_saves_and_leaves(tmp_path, launcher):
    run = RunFolder(tmp_path / "run")
    words = ["train", "opt_quotes"] if launcher == "lora-dist" else ["--nproc_per_node", "2", "recipes/opt_quotes.py"]
    flags = ["--max_steps", "100000", "--max_length", "32", "--output_dir", str(run.root), "--report_to", "none",
             "--save_steps", "0", "--eval_fraction", "0", "--dataset_test_split", "none"]  # fmt: skip
    with open(tmp_path / "err", "w") as err:
        process = subprocess.Popen([f"{BIN}/{launcher}", *words, *flags], cwd=ROOT, stdout=subprocess.DEVNULL,
                                   stderr=err)  # fmt: skip
        wait_for_step(run, 2)
        process.kill()
        process.wait()
    deadline = time.monotonic() + PATIENCE_S
    while run.read_state()["status"] != "preempted":
        assert time.monotonic() < deadline, (tmp_path / "err").read_text()
        time.sleep(0.1)
    assert run.newest_whole_checkpoint()[0] is not None
    said = (tmp_path / "err").read_text()
    assert said.count(f"warning: the launcher (process {process.pid}) is gone") <= 1 and "frame #" not in said, said


@pytest.mark.slow
def test_bad_input_found_by_the_ranks_is_one_line(tmp_path):
    process = start("opt_quotes", "--dataset_text_field", "txt", "--output_dir", str(tmp_path / "run"),
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("error: --dataset_text_field txt: ") and err.count("\n") == 1


@pytest.mark.slow
def test_a_run_ends_with_its_adapter_and_what_to_do_next(tmp_path):
    run = tmp_path / "run"
    process = start("opt_quotes", "--max_steps", "2", "--warmup_steps", "0", "--output_dir", str(run),
                    "--report_to", "none", stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    out, err = process.communicate(timeout=180)
    assert (process.returncode, err) == (0, "")
    assert "ranks: 2 on cpu" in out and "strategy: fsdp" in out
    last = out.splitlines()[-4:]
    assert last[:3] == [f"run folder: {run}", f"report: {run}/report.html", f"adapter: {run}/adapter"]
    assert last[3] == f"try it: lora-dist generate --adapter {run}/adapter 'Two things are infinite: '"
    card = (run / "adapter/README.md").read_text()
    assert card.startswith("---\n") and "| steps | 2 |" in card and "More Information Needed" not in card


REFUSED_ON_RANK_1 = """import datetime
def main(config):
    if rank == 1: raise lora_dist.UserError("--dataset_name x: no such file")
    from lora_dist.parallel.ranks import start_ranks
    start_ranks()
lora_dist.run_recipe(main, CONFIG, gpu=GPU, embedded=EMBEDDED, description="")"""


def test_a_rank_that_is_refused_alone_takes_those_along_that_wait_for_it(recipe, capfd, monkeypatch):
    monkeypatch.setattr(launcher, "GRACE_S", PATIENCE_S)  # without the signal they would be killed only then
    started = time.monotonic()
    assert train([recipe(REFUSED_ON_RANK_1), "--num_processes", "3"]) == 2
    assert time.monotonic() - started < PATIENCE_S
    assert capfd.readouterr().err == "error: --dataset_name x: no such file\n"


@pytest.mark.slow
def test_torchrun_need_not_kill_the_ranks_that_wait_for_one_that_is_refused(recipe):
    """torchrun gives ranks 30 s to leave after a SIGTERM."""
    words = [f"{BIN}/torchrun", "--nproc_per_node", "3", recipe(REFUSED_ON_RANK_1)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1 and "error: --dataset_name x: no such file" in done.stderr
    assert "SIGKILL" not in done.stderr  # which torchrun sends, and says so, after the 30 s
