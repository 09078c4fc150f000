"""Settings of a program for the import of large packages, and for the memory that torch takes afterwards."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Program:
    """Facts about this process.

    Attributes:
        is_own: True for petune's own program; False where petune is a library.
    """

    is_own: bool = False


PROGRAM = Program()


@contextmanager
def quick_imports() -> Iterator[None]:
    """Pause Python's garbage collection inside the context.

    It would run again and again over modules that stay: a fifth of the time that torch and timm take to import. In
    petune's own program, later collections leave them out, too: one over all of them takes 0.3 s.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if PROGRAM.is_own:
            gc.freeze()
        if was_enabled:
            gc.enable()


def prepare_program() -> None:
    """Choose what suits petune's own program and is not for a library to choose, before torch is imported.

    `quick_imports` keeps imported modules out of later collections. On Linux torch asks for huge pages for large
    tensors on a CPU, unless the user has decided: with pages of 4 kB the processor looks up addresses more often, which
    takes a twentieth of a step. No result depends on it.
    """
    PROGRAM.is_own = True
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
