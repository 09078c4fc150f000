"""Weights from a hub on this machine that answers correctly, or fails in every way."""

from __future__ import annotations

import hashlib
import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save

from petune.backbones.create import create_backbone
from petune.base.errors import PetuneError, WeightsUnavailable
from petune.base.hub import HubFile, check_weights_available, fetch_weights
from tests.fake_hub import point_at
from tests.sampling import sampled

SHAPE = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 2}


class Hub(http.server.ThreadingHTTPServer):
    """A hub for one file; `fault` is the way in which it fails."""

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


def test_weights_are_downloaded_once(server: Hub) -> None:
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


FAULTS = ["404", "500", "401", "cut off", "hangs", "stalls"]


@pytest.mark.parametrize("fault", sampled(FAULTS, lambda fault: fault not in {"cut off", "stalls"}))
def test_a_bad_hub_is_one_error_with_the_file_and_the_cache(fault: str, server: Hub, tmp_path: Path) -> None:
    server.content, server.fault = weights(), fault
    before = vars(huggingface_hub.constants).copy()
    started = time.monotonic()
    with pytest.raises(WeightsUnavailable, match=r"vit_tiny_patch16_224\.augreg_in21k.*model\.safetensors") as caught:
        build()
    assert time.monotonic() - started < 10
    assert all(text in str(caught.value) for text in (server.url, str(tmp_path / "cache")))
    assert "--weights none" in caught.value.cli_hint
    assert vars(huggingface_hub.constants) == before


def test_a_missing_network_is_reported_within_three_seconds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    point_at("http://127.0.0.1:9", tmp_path / "cache", monkeypatch)
    started = time.monotonic()
    with pytest.raises(WeightsUnavailable, match=r"http://127\.0\.0\.1:9 cannot be reached"):
        check_weights_available("vit_tiny", HubFile("timm/vit_tiny"))
    assert time.monotonic() - started < 3
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightsUnavailable, match="HF_HUB_OFFLINE is set"):
        fetch_weights("vit_tiny", HubFile("timm/vit_tiny"))


@pytest.mark.exhaustive
def test_a_file_at_a_url_is_downloaded_once(server: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "torch"))
    server.content = weights()
    file = HubFile("", url=f"{server.url}/vit.safetensors")
    assert fetch_weights("vit", file).read_bytes() == server.content
    asked = server.asked
    assert fetch_weights("vit", file).name == "vit.safetensors"
    assert server.asked == asked
    server.fault = "stalls"
    with pytest.raises(WeightsUnavailable, match="TimeoutError"):
        fetch_weights("vit", HubFile("", url=f"{server.url}/other.safetensors"))


def test_a_file_at_a_url_that_is_cut_off_is_not_kept(
    server: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "torch"))
    server.content, server.fault = b"x" * 100_000, "cut off"
    file = HubFile("", url=f"{server.url}/vit.pth.tar")
    with pytest.raises(WeightsUnavailable, match=r"ended after 50,000 of 100,000 bytes"):
        fetch_weights("vit", file)
    assert not list((tmp_path / "torch" / "checkpoints").iterdir())
    server.fault = ""
    assert fetch_weights("vit", file).stat().st_size == 100_000


@pytest.mark.parametrize("content", [b"<html>a captive portal</html>", b"\xff" * 4096, b""])
def test_a_download_with_wrong_bytes_is_an_error(content: bytes, server: Hub) -> None:
    server.content = content
    with pytest.raises(PetuneError, match=r"vit_tiny.*model\.safetensors"):
        build()
