"""Name a damaged weights file of a repository, of which transformers and timm say little, or nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from petune.backbones.torch_checkpoint import check_checkpoint
from petune.base.errors import CheckpointError
from petune.base.text import printable

WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names in the order in which transformers looks for them, each also as an index of several files."""
MISSING_IS_NONE = {
    f"_raise_exceptions_for_{problem}": False for problem in ("missing_entries", "connection_errors", "gated_repo")
}
AGAIN = "Download or copy it again; a pointer of Git LFS becomes the file by git lfs pull"


@contextmanager
def damage_named(name: str) -> Iterator[None]:
    """Check the weights files that a library reads inside the context, also if it fails; nothing is downloaded.

    Args:
        name: Repository or directory.

    Raises:
        CheckpointError: One is damaged.
    """
    try:
        yield
    except Exception:
        _check_files(name, are_loaded=False)
        raise
    _check_files(name, are_loaded=True)  # no library looks at the checksums of a .bin


def _check_files(name: str, *, are_loaded: bool) -> None:
    for path in _weights_files(name):
        if path.suffix != ".safetensors":
            check_checkpoint(path, is_loaded=are_loaded)
            continue
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise CheckpointError(
                f"{path} of {path.stat().st_size:,} bytes is not a whole safetensors file ({printable(str(error))}). "
                f"{AGAIN}"
            ) from None


def _weights_files(name: str) -> list[Path]:
    for file in WEIGHTS_FILES:
        whole = _find(name, file)
        if whole is not None:
            return [whole]
        index = _find(name, f"{file}.index.json")
        if index is not None:
            return [path for part in parts_of(index) if (path := _find(name, part)) is not None]
    return []


def parts_of(index: Path) -> list[str]:
    """Return the names of the files that an index of weights lists.

    Raises:
        CheckpointError: It is damaged.
    """
    try:
        parts = sorted({*json.loads(index.read_bytes())["weight_map"].values()})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of weights ({type(error).__name__}). {AGAIN}") from None
    return [str(part) for part in parts]


def _find(name: str, file: str) -> Path | None:
    from transformers.utils import cached_file

    found = cached_file(name, file, local_files_only=True, **MISSING_IS_NONE)
    return None if found is None else Path(found)
