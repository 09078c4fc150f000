"""Find the sites of a surveyed model once, instead of in each of its copies: half of the survey's time."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any
from unittest import mock

from torch import nn

import petune
from petune.sites import find
from petune.sites.input_spec import InputSpec


@contextlib.contextmanager
def found_once(model: nn.Module, sites: petune.Sites) -> Iterator[None]:
    """Let `petune.attach` and `petune.load` take the sites of `model` for its unchanged copies, with their modules.

    `petune.load` does so if the inputs that it has read from the file are equal to those of `sites`.
    """
    originals = list(model.modules())

    def copied(other: nn.Module) -> petune.Sites | None:
        modules = list(other.modules())
        if [type(m) for m in modules] != [type(m) for m in originals]:
            return None
        memo: dict[int, Any] = {id(old): new for old, new in zip(originals, modules, strict=True)}
        return copy.deepcopy(sites, memo)

    def find_sites(other: nn.Module, *args: Any, **kwargs: Any) -> petune.Sites:
        return copied(other) or find.find_sites(other, *args, **kwargs)

    def sites_for(other: nn.Module, spec: InputSpec, head: Any = None) -> petune.Sites:
        known = copied(other) if spec == sites.input_spec and head is None else None
        return known or find.sites_for(other, spec, head)

    with (
        mock.patch("petune.injector.attach.find_sites", find_sites),
        mock.patch("petune.injector.load.find_sites", find_sites),
        mock.patch("petune.injector.saved_sites.sites_for", sites_for),
    ):
        yield
