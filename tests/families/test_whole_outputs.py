"""Models that return several maps, or compare each image with each text, pass the check of methods that are right."""

from __future__ import annotations

import pytest
from survey.models import build, example_of
from survey.pairs import enliven, examine

import petune

PAIRS = [
    ("transformers SigLIP, image and text", "vpt:deep=false"),
    ("transformers LW-DETR ViT", "partial"),  # the first map that it returns is not of the last block
    ("transformers VideoPrism", "ssf"),
]


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_a_right_method_passes(family: str, method: str) -> None:
    example = example_of(family)
    model = enliven(build(family), example=example)
    outcome = examine(model, method, example, petune.find_sites(model, example=example))
    assert outcome.state == "ok", outcome.detail
