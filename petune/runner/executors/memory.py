"""The memory of this machine and of its processes, as Linux tells it."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> float | None:
    """Return the bytes that new processes can have, within the limit of a container; None where it is not known."""
    available = _kilobytes(Path("/proc/meminfo"), "MemAvailable")
    if available is None:
        return None
    with contextlib.suppress(OSError, ValueError):  # no limit, or another version of cgroups
        limit = int((CGROUP / "memory.max").read_text())
        return min(available, float(limit - int((CGROUP / "memory.current").read_text())))
    return available


def peak_memory(pid: int) -> float:
    """Return the most bytes that a process has had; 0 where it is not known."""
    return _kilobytes(Path(f"/proc/{pid}/status"), "VmHWM") or 0.0


def _kilobytes(file: Path, key: str) -> float | None:
    with contextlib.suppress(OSError):
        found = re.search(rf"^{key}:\s+(\d+) kB", file.read_text(), re.MULTILINE)
        return None if found is None else 1024.0 * int(found[1])
    return None
