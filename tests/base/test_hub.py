"""Weights from a hub on this machine that answers in every wrong way, and in the right one."""

from __future__ import annotations

import hashlib
import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save

from petune.backbones.create import create_backbone
from petune.base.errors import PetuneError, WeightsUnavailable
from tests.fake_hub import point_at

SHAPE = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 2}


class Hub(http.server.ThreadingHTTPServer):
    """A hub for one file; `fault` says how it misbehaves."""

    daemon_threads = True
    fault = ""
    content = b""
    asked = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        hub = self.server
        hub.asked += 1
        if hub.fault == "hangs":
            time.sleep(20)
        if hub.fault.isdigit():
            self.send_response(int(hub.fault))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(hub.content)))
        self.send_header("ETag", f'"{hashlib.sha256(hub.content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.end_headers()
        if body:
            self.wfile.write(hub.content[: len(hub.content) // 2 if hub.fault in ("cut off", "stalls") else None])
            if hub.fault == "stalls":
                time.sleep(20)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    served = Hub(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    point_at(served.url, tmp_path / "cache", monkeypatch)
    yield served
    served.shutdown()
    served.server_close()


def weights() -> bytes:
    torch.manual_seed(1)
    return save(timm.create_model("vit_tiny_patch16_224", num_classes=21843, **SHAPE).state_dict())


def build() -> Any:
    return create_backbone("vit_tiny", num_classes=3, options=SHAPE).model


def test_good_weights_arrive(server: Hub) -> None:
    server.content = weights()
    model = build()
    torch.manual_seed(1)
    torch.testing.assert_close(
        model.blocks[0].attn.qkv.weight,
        timm.create_model("vit_tiny_patch16_224", num_classes=21843, **SHAPE).blocks[0].attn.qkv.weight,
    )
    asked = server.asked
    build()
    assert server.asked == asked  # from the cache


@pytest.mark.parametrize("fault", ["404", "500", "401", "cut off", "hangs", "stalls"])
def test_a_bad_hub_is_named_in_ten_seconds(fault: str, server: Hub) -> None:
    server.content, server.fault = weights(), fault
    started = time.monotonic()
    with pytest.raises(
        WeightsUnavailable, match=r"vit_tiny_patch16_224\.augreg_in21k.*Ways out: .*--weights none"
    ) as caught:
        build()
    assert server.url in str(caught.value)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("content", [b"<html>a captive portal</html>", b"\xff" * 4096, b""])
def test_wrong_bytes_are_named(content: bytes, server: Hub) -> None:
    server.content = content
    with pytest.raises(PetuneError, match=r"vit_tiny.*model\.safetensors"):
        build()
