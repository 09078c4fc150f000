"""Survey every family of backbones × every method, and write docs/backbones.md from the results.

    python benchmarks/backbones.py                  # survey all; writes results/backbones.json and docs/backbones.md
    python benchmarks/backbones.py --only beit      # some families; the other rows stay as they are
    python benchmarks/backbones.py --coverage       # sort all models of transformers; writes results/transformers.json
    python benchmarks/backbones.py --all            # find the sites of every timm variant, on the meta device; writes
                                                    # results/variants.json

About an hour each on one core.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from survey.coverage import packages_of, sort_models
from survey.found_once import found_once
from survey.models import FAMILIES, build, example_of
from survey.pairs import METHODS, enliven, examine
from survey.residual_stream import unproven_mids
from survey.table import page
from survey.variants import walk

import petune

HERE = Path(__file__).resolve().parent
RESULTS, VARIANTS = HERE / "results" / "backbones.json", HERE / "results" / "variants.json"
COVERAGE = HERE / "results" / "transformers.json"
PAGE = HERE.parent / "docs" / "backbones.md"


def main() -> None:
    """Run the command line above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", metavar="FAMILY", help="parts of families' names")
    parser.add_argument("--methods", nargs="*", default=METHODS, metavar="METHOD")
    parser.add_argument("--all", action="store_true", help="walk every timm variant instead")
    parser.add_argument("--coverage", action="store_true", help="sort all models of transformers that take pixels")
    parser.add_argument("--page", action="store_true", help="write the page again from the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.all:
        VARIANTS.write_text(json.dumps(walk(), indent=1) + "\n")
        write({})
    elif args.coverage:
        kinds = sort_models(packages_of(json.loads(RESULTS.read_text())))
        COVERAGE.write_text(json.dumps({"transformers": transformers.__version__, "kinds": kinds}, indent=1) + "\n")
        write({})
    elif args.page:
        write({})
    else:
        families = [f for f in FAMILIES if args.only is None or any(part in f for part in args.only)]
        states: list[str] = []
        for family in families:
            row = survey(family, args.methods)
            if tuple(args.methods) == METHODS:  # row by row: an interrupted survey is not lost
                write({family: row})
            states += [pair["state"] for pair in row["methods"].values()]
        print(", ".join(f"{states.count(state)} {state}" for state in ("ok", "refused", "wrong")))


def write(results: dict[str, object]) -> None:
    """Write results and page; the rows of families that were not surveyed this time stay as they are."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    merged = {family: {**known, **results}[family] for family in FAMILIES if family in {**known, **results}}
    RESULTS.write_text(json.dumps(merged, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(page(merged, FAMILIES, json.loads(VARIANTS.read_text()), json.loads(COVERAGE.read_text())))


def survey(family: str, names: Iterable[str]) -> dict[str, Any]:
    """Return one row: what petune finds in the model, and the outcome of every method on it."""
    start = time.monotonic()
    example = example_of(family)
    try:
        model = enliven(build(family), example=example)
        sites = petune.find_sites(model, example=example)
    except petune.PetuneError as error:  # a package is missing, or the model takes no batches
        pair = {"state": "refused", "detail": str(error)}
        print(f"{family:42s} {pair}", flush=True)
        return {
            "model": FAMILIES[family],
            "blocks": None,
            "layout": None,
            "unproven": [],
            "methods": dict.fromkeys(names, pair),
        }
    with found_once(model, sites):
        pairs = {name: examine(model, name, example, sites) for name in names}
    for name, pair in pairs.items():
        print(f"{family:42s} {name:16s} {pair.state:8s} {pair.detail if pair.state != 'ok' else ''}", flush=True)
    wrong = unproven_mids(model, sites)
    print(f"{family:42s} {len(sites.blocks)} blocks, {time.monotonic() - start:.0f} s {wrong or ''}", flush=True)
    return {
        "model": FAMILIES[family],
        "takes": takes(sites),
        "blocks": len(sites.blocks),
        "layout": sites.blocks[0].layout if sites.blocks else None,
        "unproven": wrong,
        "methods": {name: {"state": pair.state, "detail": pair.detail} for name, pair in pairs.items()},
    }


def takes(sites: petune.Sites) -> str:
    """Return what a model takes, in a word or two."""
    spec = sites.input_spec
    if spec.is_plain:
        return {3: "image", 4: "clip"}.get(len(spec.size), "tensor")
    words = {"input_ids": "ids", "pixel_attention_mask": "patches", "grid_thw": "patches", "pixel_values": "image"}
    names = [words[name] for name in words if name in spec.kwargs]
    return ", ".join(name for name in names if not (name == "image" and "patches" in names))


if __name__ == "__main__":
    main()
