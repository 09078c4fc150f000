"""Names of run directories: one folder name, whatever the method or dataset is called."""

from __future__ import annotations

import hashlib

from petune.runner.run_config import RunConfig

LONGEST_NAME = 180
"""Bytes of a directory name; file systems allow 255."""


def run_name(config: RunConfig) -> str:
    """Return the name of the directory of a run that has no `output`."""
    return directory_name(config.method, config.backbone, config.dataset, f"seed{config.seed}")


def directory_name(*words: str) -> str:
    """Join words to one folder name, never a path: `folder:../pets` becomes `folder_.._pets`.

    A name longer than `LONGEST_NAME` is cut and gets a hash, so that two long names stay apart.
    """
    name = "-".join("".join(c if c.isalnum() or c in "._=" else "_" for c in word) for word in words)
    if len(name.encode()) <= LONGEST_NAME:
        return name
    cut = name.encode()[:LONGEST_NAME].decode(errors="ignore")
    return f"{cut}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
