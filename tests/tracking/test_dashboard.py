"""The workspace names all metrics and only those that exist, and is saved to the right view."""

import json
import os
import re
import socket
import subprocess
import sys

import pytest

from lora_dist.errors import UserError
from lora_dist.run.folder import STEP
from lora_dist.tracking.dashboard import apply, build, spec
from lora_dist.tracking.metric_names import METRICS
from tests.helpers.ranks import PATIENCE_S

NAMES = {metric.name for metric in METRICS}
OF_RANKS = {name.replace("{i}", str(rank)): name for name in NAMES for rank in (0, 11) if "{i}" in name}
IN_WORDS = {"perf/slowest_rank", "memory/worst_rank"}  # they are names of ranks, which a chart cannot show
SECTIONS = ["Loss", "Optimisation", "Throughput", "Where the time goes", "Memory per rank", "Data", "Checkpoints",
            "Samples", "Runs"]  # fmt: skip


def metric_names(spec: dict) -> set[str]:
    """The metrics and media that a spec names, axes included; per-rank metrics: see `metric_expressions`."""
    lists = [config.get(key, []) for config in _configs(spec) for key in ("metrics", "mediaKeys")]
    axes = {config["xAxis"] for config in _configs(spec) if "xAxis" in config}
    return axes.union(*lists)


def metric_expressions(spec: dict) -> set[str]:
    """The regular expressions that a spec finds metrics by."""
    return {config["metricRegex"] for config in _configs(spec) if "metricRegex" in config}


def _configs(spec: dict) -> list[dict]:
    return [panel["config"] for part in spec["section"]["panelBankConfig"]["sections"] for panel in part["panels"]]


@pytest.fixture(scope="module")
def view() -> dict:
    return spec(build("e", "p"))


def sections(view: dict) -> list[dict]:
    return view["section"]["panelBankConfig"]["sections"]


def panels(view: dict) -> list[dict]:
    return [panel for section in sections(view) for panel in section["panels"]]


def without_ids(text: str) -> dict:
    """What the server got, without the ids of panels, which are random."""
    return json.loads(text, object_hook=lambda item: {k: v for k, v in item.items() if k not in ("__id__", "id")})


def command(*words: str, env: dict | None = None) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "lora_dist.cli", "dashboard", *words]
    return subprocess.run(words, env=os.environ | (env or {}), capture_output=True, text=True, timeout=PATIENCE_S)


def refused(*words: str, env: dict | None = None) -> str:
    """The one line on stderr."""
    done = command("--entity", "someone", *words, env=env)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def test_it_names_metrics_that_exist_and_leaves_none_out(view):
    names, expressions = metric_names(view), metric_expressions(view)
    assert names - NAMES == {STEP, "eval/samples"}
    for expression in expressions:
        assert sum(bool(re.fullmatch(expression, name)) for name in OF_RANKS) == 2, expression  # ranks 0 and 11
    matched = {of for name, of in OF_RANKS.items() if any(re.fullmatch(e, name) for e in expressions)}
    assert len(expressions) == 3 and NAMES - names - matched == IN_WORDS


def test_every_line_is_drawn_over_the_steps(view):
    plots = [panel["config"] for panel in panels(view) if "Line Plot" in panel["viewType"]]
    assert len(plots) > 20 and all(plot["xAxis"] == STEP for plot in plots)
    assert [plot["metrics"] for plot in plots if plot.get("yLogScale")] == [["train/grad_norm"]]


def test_a_section_shows_all_its_panels_at_once(view):
    assert [section["name"] for section in sections(view)] == SECTIONS
    for section in sections(view):
        columns, rows = section["flowConfig"]["columnsPerPage"], section["flowConfig"]["rowsPerPage"]
        assert columns * (rows - 1) < len(section["panels"]) <= columns * rows, section["name"]
    assert [s["flowConfig"]["columnsPerPage"] for s in sections(view)[-2:]] == [1, 1]  # tables need the whole width


def test_dump_needs_no_account_and_is_the_same_each_time():
    nobody = {"WANDB_BASE_URL": "http://127.0.0.1:9", "NETRC": "/dev/null"}
    done = command("--dump", env=nobody)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == spec(build("entity", "lora-dist")) == spec(build("entity", "lora-dist"))


def test_it_is_saved_and_saved_again_over_itself(fake_wandb, view):
    env = fake_wandb.env | {
        "WANDB_APP_URL": f"{fake_wandb.url}/wandb"
    }  # a server may have a path in the address of its app
    done = command("--entity", "someone", "--project", "p", env=env)
    assert done.returncode == 0, done.stderr
    url = done.stdout.strip()
    (saved,) = fake_wandb.views
    assert (saved["entityName"], saved["projectName"], saved["displayName"]) == ("someone", "p", "lora-dist")
    assert url.startswith(f"{fake_wandb.url}/wandb/someone/p?nw=")
    assert without_ids(saved["spec"]) == view
    saved["spec"] = saved["spec"].replace("train/loss", "train/lost")  # somebody changed it
    in_a_browser = url.replace("?", "/workspace?")
    again = command("--entity", "someone", "--project", "p", "--url", in_a_browser, env=env)
    assert (again.returncode, again.stdout.strip()) == (0, url), again.stderr
    assert len(fake_wandb.views) == 1 and without_ids(saved["spec"]) == view
    assert not fake_wandb.unknown


@pytest.mark.parametrize(
    "url, why",
    [
        ("nonsense", "is not a saved view; give the address"),
        ("https://wandb.ai/someone/p", "is not a saved view"),
        ("https://wandb.ai/someone/p/workspace?nw=nwusersomeone", "is not a saved view"),
        ("https://wandb.ai/team/q/workspace/?nw=abc", "is a view of team/q: give --entity team --project q"),
    ],
    ids=["no address", "a project", "one's own workspace", "another project's"],
)
def test_what_is_no_view_of_the_project_is_not_written_over(url, why):
    with pytest.raises(UserError) as error:
        apply("someone", "p", url)
    assert str(error.value).startswith(f"--url {url}: {why}") and "\n" not in str(error.value)


def test_a_view_that_is_gone_is_one_line(fake_wandb):
    elsewhere = {
        "entityName": "someone",
        "projectName": "q",
        "name": "nw-abc-v",
        "id": "v",
        "displayName": "",
        "spec": "",
    }
    fake_wandb.views.append({**elsewhere})
    why = refused("--url", f"{fake_wandb.url}/someone/lora-dist?nw=abc", env=fake_wandb.env)
    assert "`abc` not found in project `lora-dist`" in why and fake_wandb.views == [elsewhere]


@pytest.mark.parametrize("what", ["Viewer", "UpsertView2"])
def test_what_the_server_refuses_is_one_line(fake_wandb, what):
    """The account is refused, or a view in another user's project."""
    fake_wandb.fault(what, code=403)
    why = refused(env=fake_wandb.env)
    assert why.startswith(f"error: dashboard: someone/lora-dist on {fake_wandb.url}: ") and "as asked" in why


def test_a_server_that_is_down_is_one_line(fake_wandb):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        down = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        why = refused(env=fake_wandb.env | {"WANDB_BASE_URL": down})
    assert why.startswith(f"error: WANDB_BASE_URL {down}: no answer (ConnectionError); give the address of")
    fake_wandb.fault("all", code=502)
    assert f"WANDB_BASE_URL {fake_wandb.url}: answers with HTTP 502" in refused(env=fake_wandb.env)


def test_who_is_not_logged_in_is_told(fake_wandb):
    why = refused(env=fake_wandb.env | {"WANDB_API_KEY": ""})
    assert "No API key configured. Use `wandb login`" in why and not fake_wandb.views


def test_an_entity_is_needed():
    with pytest.raises(UserError, match="--entity: is missing"):
        apply(None, "p")


def test_the_extra_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(UserError, match=re.escape("pip install 'lora-dist[dashboard]'")):
        build("e", "p")
