"""docs/backbones.md matches its results, and the results match what petune does now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from survey.coverage import packages_of, sort_models
from survey.models import FAMILIES, build
from survey.pairs import METHODS, enliven, examine
from survey.residual_stream import unproven_mids
from survey.table import in_order, library_of, page

import petune

ROOT = Path(__file__).resolve().parents[2]
RESULTS: dict[str, Any] = json.loads((ROOT / "benchmarks/results/backbones.json").read_text())
COVERAGE: dict[str, Any] = json.loads((ROOT / "benchmarks/results/transformers.json").read_text())
VARIANTS: dict[str, Any] = json.loads((ROOT / "benchmarks/results/variants.json").read_text())
EXAMPLES = [
    "swin_transformer",
    "swin_transformer_v2",
    "vision_transformer_relpos",
    "cait",
    "tnt",
]


def test_the_page_matches_the_results() -> None:
    assert (ROOT / "docs/backbones.md").read_text() == page(RESULTS, FAMILIES, VARIANTS, COVERAGE)


@pytest.mark.exhaustive
def test_no_model_of_transformers_that_takes_pixels_is_missing() -> None:
    """Those without a row have the code of one that has, build towers from a config, or are named with a reason."""
    if transformers.__version__ == COVERAGE["transformers"]:
        assert sort_models(packages_of(RESULTS)) == COVERAGE["kinds"]


def test_rows_are_families_and_columns_methods() -> None:
    """A row may lack a method that was not tried on it."""
    assert list(RESULTS) == [family for family in FAMILIES if family in RESULTS]
    for family, row in RESULTS.items():
        assert list(row["methods"]) == [method for method in METHODS if method in row["methods"]], family
        assert {"adaptformer", "vpt", "lora"} <= set(row["methods"]), family


def test_rows_are_alphabetical_in_their_library_with_variants_below_their_family() -> None:
    families = ["vision_transformer", "… average pool", "beit", "… BEiT v2", "transformers ViT", "transformers BEiT"]
    ordered = in_order(families)
    assert ordered[:2] == ["beit", "… BEiT v2"]
    assert ordered.index("… average pool") == ordered.index("vision_transformer") + 1
    assert ordered.index("transformers BEiT") < ordered.index("transformers ViT")
    assert [library_of(family) for family in families] == ["timm"] * 4 + ["transformers"] * 2


def test_reasons_that_differ_in_numbers_or_names_only_share_a_footnote() -> None:
    details = [
        "the block cannot take prompts: 16 tokens enter, but its attention is over 12 channels",
        "the block cannot take prompts: 4 tokens enter, but its attention is over 1, 16 channels",
        "ssf found nothing to train in LevitDistilled",
        "ssf found nothing to train in PixtralVisionModel",
        "bitfit found nothing to train in PixtralVisionModel",
    ]
    methods = {name: {"state": "refused", "detail": text} for name, text in zip("abcde", details, strict=True)}
    result = {"model": "ViT", "blocks": 2, "methods": methods}
    text = page({"beit": result}, ["beit"], VARIANTS, COVERAGE)
    assert "| (1) | (1) | (2) | (2) | (3) |" in text
    reasons = text.partition("### Reasons")[2].split("\n\n")[1].splitlines()
    assert [reason.endswith(details[i]) for reason, i in zip(reasons, (0, 2, 4), strict=True)] == [True] * 3
    assert ["such as" in reason for reason in reasons] == [True, True, False]


def test_no_pair_is_wrong() -> None:
    """Families that are not surveyed yet are listed on the page."""
    pairs = {(f, m): pair for f, row in RESULTS.items() for m, pair in row["methods"].items()}
    assert {key: pair for key, pair in pairs.items() if pair["state"] not in ("ok", "refused")} == {}
    assert {family: row["unproven"] for family, row in RESULTS.items() if row["unproven"]} == {}
    missing = [family for family in FAMILIES if family not in RESULTS]
    assert all(library_of(family) == "transformers" for family in missing)


def test_every_variant_of_timm_is_walked() -> None:
    assert VARIANTS["failed"] == {}
    assert VARIANTS["with_attention"] > 650


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", EXAMPLES)
def test_the_results_still_hold(family: str) -> None:
    model = enliven(build(family))
    sites = petune.find_sites(model)
    assert len(sites.blocks) == RESULTS[family]["blocks"]
    assert unproven_mids(model, sites) == []
    for method in ("adaptformer", "vpt", "vpt:deep=false"):
        outcome = examine(model, method)
        assert outcome.state == RESULTS[family]["methods"][method]["state"], (family, method, outcome.detail)


@pytest.mark.parametrize("family", ["swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr"])
def test_prompts_in_windows_do_not_mix_images(family: str) -> None:
    """Reordering a batch reorders its outputs, although its windows are rows of one tensor."""
    model = enliven(build(family))
    att = petune.attach(model, "vpt", num_prompts=4)
    for p in att.tuned.values():
        torch.nn.init.normal_(p, std=2.0, generator=torch.Generator().manual_seed(1))
    x = torch.randn(3, *att.sites.input_size)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        torch.testing.assert_close(model(x[order]), model(x)[order], atol=1e-5, rtol=1e-4)
        tuned = model(x)
        with att.disabled():
            assert not torch.allclose(model(x), tuned, atol=1e-4)
