"""A server that the real W&B client takes for Weights & Biases: in memory, on loopback, of the standard library alone.

It answers the requests of wandb 0.31 for runs, their files, tables, artifacts, alerts and views, and says what it does
not know. It checks no key, and knows nothing of how the real service merges steps: rows are kept as they come.
"""

import base64
import gzip
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

ENTITY = "someone"


@dataclass
class Run:
    """A run as the server holds it. `lines`: file name to offset to line, as the client streams them."""

    id: str = ""
    upserted: dict = field(default_factory=dict)
    lines: dict[str, dict[int, str]] = field(default_factory=dict)
    complete: bool = False
    exit_code: int | None = None

    def file(self, name: str) -> list[str]:
        return [line for _, line in sorted(self.lines.get(name, {}).items())]

    @property
    def history(self) -> list[dict]:
        return [json.loads(line) for line in self.file("wandb-history.jsonl")]

    @property
    def summary(self) -> dict:
        return json.loads((self.file("wandb-summary.json") or ["{}"])[-1])

    @property
    def config(self) -> dict:
        config = json.loads(self.upserted.get("config", "{}"))
        return {name: entry["value"] for name, entry in config.items()}

    @property
    def display_name(self) -> str:
        return self.upserted.get("displayName", "")


@dataclass
class Fault:
    """What a kind of request meets: so many seconds of silence, and an error code; the first `times` ones, or all."""

    code: int | None
    hang_s: float
    times: int | None


class FakeWandb:
    """`runs`: "entity/project/id" to run. `requests`: (kind, name) of all that came. `files`: path to what was put."""

    def __init__(self, folder: Path):
        self.runs: dict[str, Run] = {}
        self.requests: list[tuple[str, str]] = []
        self.files: dict[str, bytes] = {}
        self.views: list[dict] = []
        self.created_artifacts: dict[str, tuple[str, str]] = {}  # id to (type, name)
        self.artifacts: list[tuple[str, str]] = []  # (type, name), once committed
        self.alerts: list[tuple[str, str]] = []  # (title, text)
        self.unknown: list[str] = []  # operations that it has no answer to
        self._faults: dict[str, Fault] = {}
        self._stopped, self._folder, self.lock = False, folder, threading.RLock()

    def __enter__(self) -> "FakeWandb":
        handler = type("Handler", (_Handler,), {"fake": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda request, address: None  # a client that was killed
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def env(self) -> dict[str, str]:
        """Of a client that is logged in here, and sees nothing of the user's own account."""
        own = {f"WANDB_{name}_DIR": str(self._folder / name) for name in ("CONFIG", "CACHE", "DATA")}
        key = {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "0123456789" * 4}
        return own | key | {"NETRC": str(self._folder / "netrc")}

    def stop_runs(self) -> None:
        """Press the stop button of all runs."""
        self._stopped = True

    def fault(self, kind: str, code: int | None = None, hang_s: float = 0.0, times: int | None = None) -> None:
        """`kind`: graphql, file_stream, put, all of them, or the name of one GraphQL operation."""
        self._faults[kind] = Fault(code, hang_s, times)

    def meet_fault(self, kind: str, operation: str = "") -> int | None:
        """The error code that such a request gets."""
        with self.lock:
            faults = (self._faults.get(name) for name in (operation, kind, "all"))
            fault = next((fault for fault in faults if fault and fault.times != 0), None)
            if not fault:
                return None
            fault.times = fault.times and fault.times - 1
        time.sleep(fault.hang_s)
        return fault.code

    def stream(self, key: str, sent: dict) -> dict:
        run = self.runs.setdefault(key, Run())
        for name, chunk in (sent.get("files") or {}).items():
            lines = run.lines.setdefault(name, {})
            lines.update({chunk["offset"] + i: line for i, line in enumerate(chunk["content"])})
        run.complete = sent.get("complete") or run.complete
        run.exit_code = sent.get("exitcode", run.exit_code)
        return {"exitcode": None, "limits": {}, "stopped": self._stopped}

    def answer(self, operation: str, query: str, values: dict) -> dict | None:
        """GraphQL's `data`; None for what is not known here."""
        own: Callable[[dict], dict] | None = getattr(self, f"_{operation}", None)
        data = own(values) if own else PLAIN_ANSWERS.get(operation)
        if data is None:
            self.unknown.append(operation)
        return data

    def _find(self, values: dict) -> tuple[str, Run]:
        if values.get("id") and not values.get("name"):
            return next((key, run) for key, run in self.runs.items() if run.id == values["id"])
        entity = values.get("entity") or values.get("entityName") or ENTITY
        key = f"{entity}/{values.get('project') or 'uncategorized'}/{values['name']}"
        return key, self.runs.setdefault(key, Run())

    def _RunResumeStatus(self, values: dict) -> dict:
        key, run = self._find(values)
        entity, project, name = key.split("/")
        model = {"id": "m", "name": project, "entity": {"id": "e", "name": entity}, "bucket": None}
        if run.id:
            history, events, config = run.file("wandb-history.jsonl"), run.file("wandb-events.jsonl"), run.upserted
            telemetry = json.loads(config.get("config", "{}")).get("_wandb", {}).get("value", {}).get("t", {"1": 1})
            model["bucket"] = {
                "id": run.id, "name": name, "displayName": run.display_name, "summaryMetrics": json.dumps(run.summary),
                "logLineCount": len(run.file("output.log")), "historyLineCount": len(history),
                "eventsLineCount": len(events), "historyTail": json.dumps(history[-1:]),
                "eventsTail": json.dumps(events[-1:]), "config": config.get("config", "{}"), "tags": [],
                "notes": None, "wandbConfig": json.dumps({"t": telemetry}),
            }  # fmt: skip
        else:
            del self.runs[key]
        return {"model": model}

    def _UpsertBucket(self, values: dict) -> dict:
        key, run = self._find(values)
        entity, project, name = key.split("/")
        inserted, run.id = not run.id, run.id or base64.b64encode(f"Run:v1:{name}:{project}:{entity}".encode()).decode()
        run.upserted |= {name: value for name, value in values.items() if value is not None}
        return {"upsertBucket": {"bucket": _bucket(key, run), "inserted": inserted}}

    def _CreateRunFiles(self, values: dict) -> dict:
        files = [{"name": name, "uploadUrl": f"{self.url}/put/{values['run']}/{name}"} for name in values["files"]]
        return {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": files}}

    def _CreateArtifact(self, values: dict) -> dict:
        made = f"artifact{len(self.created_artifacts)}"
        asked = values["input"]
        self.created_artifacts[made] = asked["artifactTypeName"], asked["artifactCollectionName"]
        sequence = {"id": "s", "latestArtifact": None}
        return {"createArtifact": {"artifact": {"id": made, "state": "PENDING", "artifactSequence": sequence}}}

    def _CreateArtifactManifest(self, values: dict) -> dict:
        return {"createArtifactManifest": {"artifactManifest": self._manifest()}}

    def _manifest(self) -> dict:
        return {"id": "m", "file": {"uploadUrl": f"{self.url}/put/manifest", "uploadHeaders": []}}

    def _CreateArtifactFiles(self, values: dict) -> dict:
        nodes = [
            {
                "id": f"f{i}", "name": asked["name"], "displayName": asked["name"], "uploadHeaders": [],
                "uploadUrl": f"{self.url}/put/{asked['artifactID']}/{asked['name']}", "storagePath": f"a/{i}",
                "uploadMultipartUrls": None, "artifact": {"id": asked["artifactID"]},
            }
            for i, asked in enumerate(values["input"]["artifactFiles"])
        ]  # fmt: skip
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def _CommitArtifact(self, values: dict) -> dict:
        self.artifacts.append(self.created_artifacts[values["artifactID"]])
        return {"commitArtifact": {"artifact": {"id": values["artifactID"], "digest": "d"}}}

    def _NotifyScriptableRunAlert(self, values: dict) -> dict:
        self.alerts.append((values["title"], values["text"]))
        return {"notifyScriptableRunAlert": {"success": True}}

    def _UpsertView2(self, values: dict) -> dict:
        known = [view for view in self.views if values.get("id") and view["id"] == values["id"]]
        if known:
            known[0].update(values)
        else:
            self.views.append({**values, "id": base64.b64encode(f"View:{len(self.views)}".encode()).decode()})
        view = known[0] if known else self.views[-1]
        return {"upsertView": {"view": {"id": view["id"], "name": view.get("name")}, "inserted": not known}}

    def _View(self, values: dict) -> dict:
        asked = values["entityName"], values["projectName"], values["viewName"]
        nodes = [view for view in self.views if (view["entityName"], view["projectName"], view["name"]) == asked]
        nodes = [{"id": view["id"], "displayName": view["displayName"], "spec": view["spec"]} for view in nodes]
        return {"project": {"allViews": {"edges": [{"node": node} for node in nodes]}}}


def _bucket(key: str, run: Run) -> dict:
    entity, project, name = key.split("/")
    return {
        "id": run.id, "name": name, "displayName": run.display_name or name, "description": None,
        "config": run.upserted.get("config", "{}"), "sweepName": None,
        "project": {"id": "p", "name": project, "entity": {"id": "e", "name": entity}},
        "historyLineCount": len(run.history),
    }  # fmt: skip


VIEWER = {
    "id": "v", "entity": ENTITY, "username": ENTITY, "name": ENTITY, "email": "someone@example.org", "flags": "{}",
    "deletedAt": None, "admin": False, "teams": {"edges": []}, "apiKeys": {"edges": []},
}  # fmt: skip
PLAIN_ANSWERS = {
    "/graphql": {"__typename": "Query"},  # of a query without a name: whether anybody answers
    "Viewer": {"viewer": VIEWER},
    "GetViewer": {"viewer": VIEWER},
    "SharedViewer": {"viewer": VIEWER},
    "ServerInfo": {
        "serverInfo": {
            "cliVersionInfo": {"max_cli_version": "0.99.0", "min_cli_version": "0.0.1"},
            "latestLocalVersionInfo": None,
        }
    },
    "OrgFeatureFlags": {"organization": None},
    "ServerFeaturesQuery": {"serverInfo": {"features": []}},
    "OrganizationCoreWeaveOrganizationID": {"entity": {"organization": None}},
    "ArtifactType": {"project": None},
    "MarkRunFilesUploaded": {"markRunFilesUploaded": {"success": True}},
}


class _Handler(BaseHTTPRequestHandler):
    fake: FakeWandb
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        path = urlparse(self.path).path
        self.fake.requests.append(("get", path))
        self._send(200 if path in self.fake.files else 404, self.fake.files.get(path, b"{}"))

    def do_PUT(self) -> None:
        path, body = urlparse(self.path).path, self._body()
        self.fake.requests.append(("put", path))
        code = self.fake.meet_fault("put")
        if not code:
            self.fake.files[path] = body
        self._send(code or 200, b"{}")

    def do_POST(self) -> None:
        path, body = urlparse(self.path).path, self._body()
        stream = re.fullmatch("/files/([^/]+)/([^/]+)/([^/]+)/file_stream", path)
        kind = "file_stream" if stream else "graphql" if path == "/graphql" else "post"
        sent = json.loads(body) if kind != "post" else {}
        named = re.search(r"(?:query|mutation)\s+(\w+)", sent.get("query", ""))
        operation = sent.get("operationName") or (named[1] if named else path)
        self.fake.requests.append((kind, operation))
        if code := self.fake.meet_fault(kind, operation):
            return self._send(code, b'{"errors": [{"message": "as asked"}]}')
        with self.fake.lock:
            if stream:
                answer = self.fake.stream("/".join(map(unquote, stream.groups())), sent)
            elif kind == "graphql":
                data = self.fake.answer(operation, sent["query"], sent.get("variables") or {})
                errors = {} if data is not None else {"errors": [{"message": f"{operation}: not known here"}]}
                answer = {"data": data, **errors}
            else:
                return self._send(404, b"{}")
        self._send(200, json.dumps(answer).encode())

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.headers.get("transfer-encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body

    def _send(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
