"""A Hugging Face Hub on this machine, with repositories, LFS uploads, commits and downloads, and faults on demand."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from petune.base import hub
from petune.serving import transfer

TOKEN = "hf_right"


class Server(http.server.ThreadingHTTPServer):
    """The contents of the hub, and how it misbehaves.

    Attributes:
        repos: Files by name, by repository; those in `private` answer only to TOKEN, those in `gated` to nobody.
        blobs: Uploaded LFS contents by SHA-256.
        fault: (part of a path, fault): a status, `hangs`, `stalls`, `cut off`, `other bytes`, or `endless`.
        requests: Method and path of every request.
        listed_size: Size that the listing gives for every file; None gives the real ones.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.blobs: dict[str, bytes] = {}
        self.fault = ("", "")
        self.requests: list[str] = []
        self.listed_size: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, repo: str) -> str:
        """Return an id that changes with the files."""
        return hashlib.sha1(repr(sorted(self.repos[repo].items())).encode()).hexdigest()


class Answer(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def do_PUT(self) -> None:
        self._route()

    def _route(self) -> None:
        path = self.path.partition("?")[0]
        body = self._body()
        self.server.requests.append(f"{self.command} {path}")
        part, fault = self.server.fault
        self.fault = fault if part and part in path else ""
        if self.fault == "hangs":
            time.sleep(20)
        if self.fault.isdigit():
            self._send(int(self.fault), b"{}")
        elif (
            self.command in ("POST", "PUT")
            and self.headers.get("Authorization") != f"Bearer {TOKEN}"
            and ("/lfs-put/" not in path and "validate-yaml" not in path)
        ):
            self._send(401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"})
        else:
            self._answer(path, body)

    def _answer(self, path: str, body: bytes) -> None:
        hub = self.server
        if path == "/api/repos/create":
            fields = json.loads(body)
            name = f"{fields.get('organization') or 'me'}/{fields['name']}"
            if name in hub.repos:
                return self._send(409, b'{"error": "You already created this model repo"}')
            hub.repos[name] = {}
            if fields.get("visibility") == "private" or fields.get("private"):
                hub.private.add(name)
            return self._json({"url": f"{hub.url}/{name}"})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path.startswith("/lfs-put/"):
            hub.blobs[path.rpartition("/")[2]] = body
            return self._send(200, b"")
        match = re.fullmatch(r"(?:/api/(?:models|datasets))?/([\w.-]+/[\w.-]+?)(?:\.git)?(/.*)?", path)
        repo, rest = (match[1], match[2] or "") if match else ("", "")
        is_visible = repo in hub.repos and (repo not in hub.private or TOKEN in self.headers.get("Authorization", ""))
        if not is_visible:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        return self._of_repo(repo, rest, body)

    def _of_repo(self, repo: str, rest: str, body: bytes) -> None:
        hub, files = self.server, self.server.repos[repo]
        if rest.startswith("/preupload/"):
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                 "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]  # fmt: skip
            return self._json({"files": modes})
        if rest == "/info/lfs/objects/batch":
            objects = [
                {**o, "actions": {"upload": {"href": f"{hub.url}/lfs-put/{o['oid']}", "header": {}}}}
                for o in json.loads(body)["objects"]
            ]
            return self._json({"objects": objects, "transfer": "basic"})
        if rest.startswith("/commit/"):
            for line in map(json.loads, body.decode().splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.blobs[value["oid"]]
            commit = hub.commit(repo)
            return self._json({"commitUrl": f"{hub.url}/{repo}/commit/{commit}", "commitOid": commit})
        if rest.startswith("/resolve/"):
            return self._file(files.get(rest.split("/", 3)[3]), hub.commit(repo))
        if rest == "/auth-check":
            gated = {"X-Error-Code": "GatedRepo"} if repo in hub.gated else {}
            return self._send(403 if gated else 200, b"{}", gated)
        if rest.startswith("/revision/") and rest != "/revision/main":
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        gated_field = {"gated": "manual"} if repo in hub.gated else {}
        return self._json(
            {**gated_field, "id": repo, "sha": hub.commit(repo), "siblings": [*map(self._listed, files.items())]}
        )

    def _listed(self, file: tuple[str, bytes]) -> dict[str, Any]:
        name, content = file
        size = len(content) if self.server.listed_size is None else self.server.listed_size
        large = {"sha256": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 130}
        return {"rfilename": name, "size": size, **({"lfs": large} if name.endswith(".safetensors") else {})}

    def _file(self, content: bytes | None, commit: str) -> None:
        if content is None:
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        if self.fault == "other bytes":
            content = content[:-8] + bytes(8)
        if self.fault == "endless":
            content += bytes(4 << 20)
        etag = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}
        if self.fault in ("stalls", "cut off") and self.command == "GET":
            self._send(200, content, etag, end=len(content) // 2)
            self.close_connection = True
            if self.fault == "stalls":
                time.sleep(20)
            return None
        return self._send(200, content, etag)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode())

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None, end: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:end])
            self.wfile.flush()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))


def point_at(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch, stall_timeout_s: float = 2.0) -> None:
    """Let petune and huggingface_hub use that address, with short timeouts and a separate cache."""
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # read at import, where it may be set
    for proxy in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    # a thread that an earlier test left waiting would, on its retry, close the connections of all threads
    monkeypatch.setattr("huggingface_hub.utils._http.close_session", lambda: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    monkeypatch.setattr(hub, "TIMEOUT_S", 1.0)
    monkeypatch.setattr(transfer, "STALL_TIMEOUT_S", stall_timeout_s)


@contextmanager
def running() -> Iterator[Server]:
    """Run a hub until the end of the block."""
    served = Server()
    threading.Thread(target=served.serve_forever, daemon=True).start()
    try:
        yield served
    finally:
        served.shutdown()
        served.server_close()
