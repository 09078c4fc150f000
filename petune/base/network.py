"""Check whether a host answers, before a library retries for most of a minute (timm without a network: 49 s)."""

from __future__ import annotations

import socket
import urllib.request
from urllib.parse import urlsplit


def reachable(url: str, timeout_s: float = 1.0) -> bool:
    """Return True if the host of `url`, or the proxy for its scheme, accepts a connection within `timeout_s`."""
    parts = urlsplit(_proxy_for(url) or url)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        with socket.create_connection((parts.hostname or "", port), timeout=timeout_s):
            return True
    except (OSError, ValueError):  # ValueError: the port is not a number
        return False


def _proxy_for(url: str) -> str | None:
    """Return the proxy that Python's clients would use: by scheme, unless `no_proxy` names the host."""
    parts = urlsplit(url)
    if urllib.request.proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    return f"http://{proxy}" if proxy and "://" not in proxy else proxy
