"""The workspace: it names only metrics that exist, leaves none out, and is saved where it should be."""

import json
import os
import re
import subprocess
import sys

import pytest

from lora_dist.config import UserError
from lora_dist.dashboard import apply, build, spec
from lora_dist.metric_names import METRICS
from lora_dist.run_folder import STEP

NAMES = {metric.name for metric in METRICS}
OF_RANKS = {name.replace("{i}", str(rank)): name for name in NAMES for rank in (0, 11) if "{i}" in name}
IN_WORDS = {"perf/slowest_rank", "memory/worst_rank"}  # names of ranks, which no chart shows


def panels(view: dict) -> list[dict]:
    return [panel for section in view["section"]["panelBankConfig"]["sections"] for panel in section["panels"]]


def shown(view: dict) -> tuple[set[str], set[str]]:
    """(metrics by name, regular expressions)."""
    configs = [panel["config"] for panel in panels(view)]
    names = {name for config in configs for name in config.get("metrics", [])}
    return names, {config["metricRegex"] for config in configs if "metricRegex" in config}


def command(*words: str, env: dict | None = None) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "lora_dist.cli", "dashboard", *words]
    return subprocess.run(words, env=os.environ | (env or {}), capture_output=True, text=True, timeout=120)


def test_it_names_metrics_that_exist_and_leaves_none_out():
    names, expressions = shown(spec(build("e", "p")))
    assert len(expressions) == 3 and names <= NAMES, names - NAMES
    matched = {of for name, of in OF_RANKS.items() if any(re.fullmatch(e, name) for e in expressions)}
    for expression in expressions:
        assert sum(bool(re.fullmatch(expression, name)) for name in OF_RANKS) == 2, expression  # ranks 0 and 11
    assert NAMES - names - matched == IN_WORDS


def test_every_line_is_drawn_over_the_steps():
    plots = [panel["config"] for panel in panels(spec(build("e", "p"))) if "Line Plot" in panel["viewType"]]
    assert len(plots) > 20 and all(plot["xAxis"] == STEP for plot in plots)
    assert any(plot.get("yLogScale") for plot in plots)
    assert "eval/samples" in json.dumps([p for p in panels(spec(build("e", "p"))) if "Media" in p["viewType"]])


def test_dump_needs_no_account_and_is_the_same_each_time():
    nobody = {"WANDB_BASE_URL": "http://127.0.0.1:9", "NETRC": "/dev/null"}
    done = command("--dump", env=nobody)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == spec(build("entity", "lora-dist")) == spec(build("entity", "lora-dist"))


def test_it_is_saved_and_saved_again_over_itself(fake_wandb):
    done = command("--entity", "someone", "--project", "p", env=fake_wandb.env)
    assert done.returncode == 0, done.stderr
    url = done.stdout.strip()
    (view,) = fake_wandb.views
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("someone", "p", "lora-dist")
    assert url.startswith("http") and "/someone/p" in url
    expected = spec(build("someone", "p"))
    assert shown(json.loads(view["spec"])) == shown(expected)
    view["spec"] = json.dumps(json.loads(view["spec"].replace("train/loss", "train/lost")))  # somebody changed it
    again = command("--entity", "someone", "--project", "p", "--url", url, env=fake_wandb.env)
    assert (again.returncode, again.stdout.strip()) == (0, url), again.stderr
    assert len(fake_wandb.views) == 1 and shown(json.loads(view["spec"])) == shown(expected)


def test_what_the_server_refuses_is_one_line(fake_wandb):
    fake_wandb.fault("graphql", code=403)
    done = command("--entity", "someone", env=fake_wandb.env)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"error: dashboard: someone/lora-dist on {fake_wandb.url}: ")
    assert "as asked" in done.stderr


def test_who_is_not_logged_in_is_told(fake_wandb):
    done = command("--entity", "someone", env=fake_wandb.env | {"WANDB_API_KEY": ""})
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "key" in done.stderr


def test_an_entity_is_needed():
    with pytest.raises(UserError, match="--entity: is missing"):
        apply(None, "p", None)
