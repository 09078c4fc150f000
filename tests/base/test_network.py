"""Whether a host answers is known within seconds."""

from __future__ import annotations

import socket
import time

import pytest

from petune.base.network import reachable


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def listening() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]  # type: ignore[misc]


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def test_a_listening_host_is_reachable(listening: int) -> None:
    assert reachable(f"http://127.0.0.1:{listening}/file.tar.gz")


def test_a_closed_port_is_not_reachable(closed_port: int) -> None:
    assert not reachable(f"http://127.0.0.1:{closed_port}/")


def test_a_proxy_is_asked_instead_of_the_host(
    listening: int, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{listening}")
    assert reachable("https://host.invalid/x")
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{closed_port}")
    assert not reachable("https://host.invalid/x")


def test_a_proxy_without_a_scheme_and_hosts_without_a_proxy(
    listening: int, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", f"127.0.0.1:{listening}")
    assert reachable("https://host.invalid/x")
    monkeypatch.setenv("https_proxy", "127.0.0.1:port")
    assert not reachable("https://host.invalid/x")
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{closed_port}")
    assert not reachable(f"https://127.0.0.1:{listening}/x")
    monkeypatch.setenv("no_proxy", "example.org,127.0.0.1")
    assert reachable(f"https://127.0.0.1:{listening}/x")


@pytest.mark.parametrize("url", ["https://host.invalid/x", "http://192.0.2.1/x", "not a url", ""])
def test_an_unreachable_host_is_known_within_three_seconds(url: str) -> None:
    start = time.perf_counter()
    assert not reachable(url, timeout_s=1)
    assert time.perf_counter() - start < 3
