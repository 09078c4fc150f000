"""The measurements of benchmarks/ that have no suite: what they store of earlier rows, of failures and of a kill."""

from __future__ import annotations

import http.server
import importlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import adapter_bank
import averaging
import averaging_page
import backbones
import pytest
import versions
import versions_worker
from result_files import write_json

import petune

ROOT = Path(__file__).parents[1]
JOBS = [("task0", 0)] * 12


@pytest.fixture
def serve_load(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Return benchmarks/serve_load.py, also where LitServe is not installed."""
    monkeypatch.setitem(sys.modules, "litserve", SimpleNamespace(LitAPI=object))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield importlib.import_module("serve_load")
    for name in ("serve_load", "serve"):
        sys.modules.pop(name)


@pytest.fixture
def server() -> Iterator[http.server.ThreadingHTTPServer]:
    """Return a server whose `answers` are given one after the other."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def do_POST(self) -> None:
            """Give the next answer."""
            self.rfile.read(int(self.headers["Content-Length"]))
            with self.server.lock:
                status, body = self.server.answers.pop(0)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    class Server(http.server.ThreadingHTTPServer):
        answers: list[tuple[int, bytes]]
        lock = threading.Lock()
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


def _client(serve_load: ModuleType, monkeypatch: pytest.MonkeyPatch, kind: str, port: int) -> Any:
    monkeypatch.setattr(serve_load, "PORTS", {"bank": port, "bare": port})
    return serve_load.Client(kind, ["x"], {"task0": [[1.0, 2.0]]})


@pytest.mark.parametrize(("kind", "num_wrong"), [("bank", 10), ("bare", 8)])
def test_a_request_that_fails_is_wrong_and_not_served(
    kind: str, num_wrong: int, serve_load: ModuleType, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = [(500, b'{"logits": [1.0, 2.0]}'), (200, b'{"error": "full"}'), (200, b'{"logits": [NaN, NaN]}'), (200, b"<")]
    server.answers = [(200, b'{"logits": [1.0, 2.0]}')] * 2 + [(200, b'{"logits": [3, 2]}')] * 2 + bad * 2
    client = _client(serve_load, monkeypatch, kind, server.server_address[1])
    assert client.round(JOBS) > 0
    assert (len(client.latencies), len(client.wrong)) == (4, num_wrong)
    assert any("status 500" in text for text in client.wrong)
    assert any("full" in text for text in client.wrong)


def test_without_a_server_every_request_is_wrong(
    serve_load: ModuleType, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = server.server_address[1]
    server.server_close()
    client = _client(serve_load, monkeypatch, "bank", port)
    assert client.round(JOBS) == 0
    assert len(client.wrong) == len(JOBS)


class _Study(averaging.Study):
    """Trains nothing."""

    def runs(self, name: str) -> list[Any]:
        """Return three seeds."""
        origin = {"git": {"commit": f"of the runs of {name}", "dirty": False}}
        values = {"metrics": {"top1": 1.0}, "val_metrics": {"top1": 1.0}, "adapter_bytes": 1, "provenance": origin}
        return [SimpleNamespace(**values)] * 3

    def average(self, *_: object) -> dict[str, Any]:
        """Refuse."""
        return {"refused": "there is no val split"}


def test_a_row_of_averages_keeps_its_options_and_provenance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(averaging, "Study", _Study)
    before = json.loads(averaging_page.RESULT.read_text())["digits"]
    before["provenance"] = {"git": {"commit": "earlier", "dirty": False}}  # as an earlier version stored it
    before["rows"] = {key: {**row} for key, row in before["rows"].items()}
    for row in before["rows"].values():
        row.pop("provenance", None)
    new = averaging.measure("digits", tmp_path, ["lora"], before)
    assert [one["git"]["commit"] for one in new["rows"]["bitfit"]["provenance"]] == ["earlier"]
    assert new["rows"]["lora"]["provenance"][0]["git"]["commit"] == "of the runs of lora"
    write_json(tmp_path / "averaging.json", {"digits": new})
    page = "\n".join(averaging_page.section(tmp_path / "averaging.json"))
    assert "Measured at commit of the , commit " in page
    assert "commit earlier" in page
    assert "- `greedy` of `lora` is refused: there is no val split" in page
    assert "- `wise_ft` of `adaptformer` is refused: adaptformer starts with random values" in page

    monkeypatch.setitem(averaging.SETTINGS["digits"]["train"], "epochs", 99)
    with pytest.raises(SystemExit, match=r"have other options\. Measure all, without --only"):
        averaging.measure("digits", tmp_path, ["lora"], new)
    every = [*averaging.METHODS, averaging.COMMON_START]
    assert averaging.measure("digits", tmp_path, every)["options"]["train"]["epochs"] == 99


def test_a_row_of_the_bank_keeps_its_provenance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_own_process(flag: str, method: str, *limit: str) -> dict[str, Any]:
        return {"method": method, "limit": int(limit[0]) or None} if limit else {"method": method}

    monkeypatch.setattr(adapter_bank, "RESULTS", tmp_path / "adapter_bank.json")
    monkeypatch.setattr(adapter_bank, "in_own_process", in_own_process)
    earlier = {"git": "earlier"}
    memory = [{"method": "lora", "limit": None}]
    write_json(adapter_bank.RESULTS, {"rows": [{"method": "lora"}], "memory": memory, "provenance": earlier})
    adapter_bank.run(["adaptformer"])
    stored = json.loads(adapter_bank.RESULTS.read_text())
    for kind in ("rows", "memory"):
        known = {row["method"]: row["provenance"] for row in stored[kind]}
        assert known["lora"] == earlier
        assert known["adaptformer"]["versions"]["torch"]


@pytest.fixture
def moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let versions.py save and load in this process."""

    def run(python: Path, command: str, directory: Path, file: Path, *models: str) -> None:
        work = versions_worker.save if command == "save" else versions_worker.load
        file.write_text(json.dumps(work(directory, [*(models or ["torchvision ViT"])])))

    monkeypatch.setattr(versions_worker, "METHODS", {"linear": {}, "norm": {}})
    for name, value in {
        "run": run,
        "PAGE": tmp_path / "page.md",
        "RESULT": tmp_path / "result.json",
        "oldest_environment": lambda path: path,
        "installed_versions": lambda python: dict.fromkeys(versions.LIBRARIES, "2"),
    }.items():
        monkeypatch.setattr(versions, name, value)
    monkeypatch.setattr(sys, "argv", ["versions.py", "--work", str(tmp_path)])
    return tmp_path


def test_a_crash_while_an_adapter_is_saved_is_a_crash(moved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = petune.Attachment.save

    def broken(self: petune.Attachment, path: Path) -> None:
        if self.name == "norm":
            raise AttributeError("module has no attribute gamma")
        save(self, path)

    monkeypatch.setattr(petune.Attachment, "save", broken)
    with pytest.raises(SystemExit) as stopped:
        versions.main()
    assert stopped.value.code == "wrong or crashed: torchvision ViT|norm, torchvision ViT|norm"
    assert "| torchvision ViT | 1 of 2; norm: 1 |" in versions.PAGE.read_text()


def test_models_are_added_to_results_of_the_same_versions_alone(moved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="0"):
        versions.main()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--models", "torchvision ViT"])
    with pytest.raises(SystemExit, match="0"):
        versions.main()
    before = versions.RESULT.read_text()
    monkeypatch.setattr(versions, "installed_versions", lambda python: dict.fromkeys(versions.LIBRARIES, "3"))
    with pytest.raises(SystemExit, match="were measured with other versions"):
        versions.main()
    assert versions.RESULT.read_text() == before


def test_an_environment_of_other_versions_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def create(path: Path, symlinks: bool) -> None:
        made.append(path)
        (path / "lib" / "python3" / "site-packages").mkdir(parents=True)
        (path / "pyvenv.cfg").touch()

    monkeypatch.setattr(versions.venv, "create", create)
    monkeypatch.setattr(versions.subprocess, "run", lambda *_, **__: None)
    for lowest in ("1", "1", "2"):
        requirements = [f"{name}=={lowest}" for name in versions.LIBRARIES]
        monkeypatch.setattr(versions, "lowest_versions", lambda r=requirements: r)
        versions.oldest_environment(tmp_path / "oldest")
    assert len(made) == 2


def test_a_row_is_older_than_a_change_of_anything_that_it_depends_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> str:
        name = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        return subprocess.run(["git", *name, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    commits = []
    for folder in ("petune", "plugins/petune-ssf", "benchmarks/survey", "docs"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "file").touch()
        git("add", ".")
        git("commit", "-qm", folder)
        commits.append(git("rev-parse", "HEAD").strip())
    monkeypatch.setattr(backbones, "HERE", tmp_path)
    monkeypatch.setattr(backbones, "RESULTS", tmp_path / "backbones.json")
    write_json(backbones.RESULTS, {str(number): {"commit": commit} for number, commit in enumerate(commits)})
    for commit, again in (("HEAD", ["0", "1"]), (commits[1], ["0"]), (commits[0], [])):
        assert backbones.without_rows_since(["0", "1", "2"], commit) == again


def test_a_kill_leaves_the_earlier_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No script opens a result itself: what it is interrupted in is never the file that pages read."""
    plain = {
        file.name: [line for line in file.read_text().splitlines() if ".write_text(json.dumps(" in line]
        for file in (ROOT / "benchmarks").glob("*.py")
        if file.name not in {"any_task.py", "pieces.py", "versions_worker.py"}  # configurations, pieces, a report
    }
    assert {name: lines for name, lines in plain.items() if lines} == {}
    file = tmp_path / "result.json"
    write_json(file, {"value": 1})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_json(file, {"value": 2})
    assert json.loads(file.read_text()) == {"value": 1}
