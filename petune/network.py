"""Is a host there? Asked before a library may retry for most of a minute (timm without a network: 49 s)."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit


def reachable(url: str, timeout_s: float = 1.0) -> bool:
    """True where the host of `url`, or the proxy set for its scheme, accepts a connection in `timeout_s`."""
    parts = urlsplit(_proxy_for(url) or url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((parts.hostname or "", port), timeout=timeout_s):
            return True
    except OSError:
        return False


def _proxy_for(url: str) -> str | None:
    name = f"{urlsplit(url).scheme}_proxy"
    return os.environ.get(name) or os.environ.get(name.upper())
