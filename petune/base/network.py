"""Is a host there? Asked before a library may retry for most of a minute (timm without a network: 49 s)."""

from __future__ import annotations

import socket
import urllib.request
from urllib.parse import urlsplit


def reachable(url: str, timeout_s: float = 1.0) -> bool:
    """True where the host of `url`, or the proxy set for its scheme, accepts a connection in `timeout_s`."""
    parts = urlsplit(_proxy_for(url) or url)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        with socket.create_connection((parts.hostname or "", port), timeout=timeout_s):
            return True
    except (OSError, ValueError):  # the latter for a port that is no number
        return False


def _proxy_for(url: str) -> str | None:
    """As Python's own clients find it: by the scheme, unless `no_proxy` names the host."""
    parts = urlsplit(url)
    if urllib.request.proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    known = urllib.request.getproxies()
    proxy = known.get(parts.scheme) or known.get("all")
    return f"http://{proxy}" if proxy and "://" not in proxy else proxy
