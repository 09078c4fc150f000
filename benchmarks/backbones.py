"""Survey every family of backbones × every method, and write docs/backbones.md from the results.

    python benchmarks/backbones.py                  # survey all; writes results/backbones.json and docs/backbones.md
    python benchmarks/backbones.py --jobs 2         # the same, in two processes of one thread each
    python benchmarks/backbones.py --resume         # leave out the families that this commit has surveyed already
    python benchmarks/backbones.py --missing        # try only the methods that a row lacks
    python benchmarks/backbones.py --only beit      # some families; the other rows stay as they are
    python benchmarks/backbones.py --coverage       # sort all models of transformers; writes results/transformers.json
    python benchmarks/backbones.py --all            # find the sites of every timm variant, on the meta device; writes
                                                    # results/variants.json

Each row is written when it is ready, with the commit that it was made with. The others but the first take about an hour
on one core; the first takes as long as the rows say.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import transformers
from result_files import write_json
from survey.coverage import packages_of, sort_models
from survey.found_once import found_once
from survey.models import FAMILIES, build, example_of
from survey.pairs import METHODS, enliven, examine
from survey.residual_stream import unproven_mids
from survey.table import page
from survey.variants import walk

import petune
from petune.base.files import replace_file

HERE = Path(__file__).resolve().parent
RESULTS, VARIANTS = HERE / "results" / "backbones.json", HERE / "results" / "variants.json"
COVERAGE = HERE / "results" / "transformers.json"
PAGE = HERE.parent / "docs" / "backbones.md"
SURVEYED = (":/petune", ":/plugins/petune-ssf", ":/benchmarks/survey")
"""What a row depends on, for git: petune, the plugin that is a column, and the survey itself."""


def main() -> None:
    """Run the command line above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", metavar="FAMILY", help="parts of families' names")
    parser.add_argument("--methods", nargs="*", default=METHODS, metavar="METHOD")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="HEAD",
        metavar="COMMIT",
        help="leave out the rows that were made with this commit (by default the current one) or a later one",
    )
    parser.add_argument("--missing", action="store_true", help="try only the methods that a row lacks")
    parser.add_argument("--all", action="store_true", help="walk every timm variant instead")
    parser.add_argument("--coverage", action="store_true", help="sort all models of transformers that take pixels")
    parser.add_argument("--page", action="store_true", help="write the page again from the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.all:
        write_json(VARIANTS, walk())
        write({})
    elif args.coverage:
        kinds = sort_models(packages_of(json.loads(RESULTS.read_text())))
        write_json(COVERAGE, {"transformers": transformers.__version__, "kinds": kinds})
        write({})
    elif args.page:
        write({})
    else:
        families = [f for f in FAMILIES if args.only is None or any(part in f for part in args.only)]
        if args.resume:
            families = without_rows_since(families, args.resume)
        commit = git("log", "-1", "--format=%H", "--", *SURVEYED)
        states: list[str] = []
        methods = {family: tuple(args.methods) for family in families}
        if args.missing:
            methods = missing_of(methods)
        for number, (family, row) in enumerate(survey_all(methods, args.jobs), 1):
            if methods[family] == METHODS:  # row by row: an interrupted survey is not lost
                write({family: {**row, "commit": commit}})
            elif args.missing:
                write({family: with_methods(known_rows().get(family, {"methods": {}}), row)})
            states += [pair["state"] for pair in row["methods"].values()]
            print(f"{number} of {len(methods)}: {family}, {row['seconds']} s", flush=True)
        print(", ".join(f"{states.count(state)} {state}" for state in ("ok", "refused", "wrong")))


def survey_all(methods: Mapping[str, Iterable[str]], jobs: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield families with their rows as they become ready, the slowest of the last survey first."""
    known = known_rows()
    families = sorted(methods, key=lambda family: -known.get(family, {}).get("seconds", 0))
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        rows = {pool.submit(survey, family, methods[family]): family for family in families}
        for future in as_completed(rows):
            error = future.exception()
            if error is None:
                yield rows[future], future.result()
            else:  # the survey goes on; the row stays as it was
                print(f"{rows[future]}: no row, {type(error).__name__}: {error}", flush=True)


def without_rows_since(families: list[str], commit: str) -> list[str]:
    """Return the families without a row that was made with a commit, or a later one, of what rows depend on."""
    since = git("log", "-1", "--format=%H", commit, "--", *SURVEYED)
    later = {since, *git("log", "--format=%H", f"{since}..HEAD", "--", *SURVEYED).split()}
    known = known_rows()
    return [family for family in families if known.get(family, {}).get("commit") not in later]


def missing_of(methods: Mapping[str, Iterable[str]]) -> dict[str, tuple[str, ...]]:
    """Return, of the methods of each family, those that its row lacks; families that lack none are left out."""
    known = known_rows()
    tried = {family: known.get(family, {}).get("methods", {}) for family in methods}
    lacking = {family: tuple(m for m in wanted if m not in tried[family]) for family, wanted in methods.items()}
    return {family: several for family, several in lacking.items() if several}


def with_methods(row: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Return a row with the outcomes of more methods; it has no commit, because it was made with several."""
    both = {**row["methods"], **more["methods"]}
    merged = {**row, **more, "methods": {method: both[method] for method in METHODS if method in both}}
    merged["seconds"] = row.get("seconds", 0) + more["seconds"]
    merged.pop("commit", None)
    return merged


def known_rows() -> dict[str, Any]:
    """Return the rows that there are."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def git(*arguments: str) -> str:
    """Return what git prints in the repository of this file."""
    run = subprocess.run(["git", *arguments], cwd=HERE, check=True, capture_output=True, text=True)
    return run.stdout.strip()


def write(results: dict[str, object]) -> None:
    """Write results and page; the rows of families that were not surveyed this time stay as they are."""
    known = known_rows()
    merged = {family: {**known, **results}[family] for family in FAMILIES if family in {**known, **results}}
    replace_file(RESULTS, (json.dumps(merged, indent=1, ensure_ascii=False) + "\n").encode())
    text = page(merged, FAMILIES, json.loads(VARIANTS.read_text()), json.loads(COVERAGE.read_text()))
    replace_file(PAGE, text.encode())


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
            "seconds": round(time.monotonic() - start),
            "methods": dict.fromkeys(names, pair),
        }
    with found_once(model, sites):
        pairs = {name: examine(model, name, example, sites) for name in names}
    for name, pair in pairs.items():
        print(f"{family:42s} {name:16s} {pair.state:8s} {pair.detail if pair.state != 'ok' else ''}", flush=True)
    wrong = unproven_mids(model, sites)
    print(f"{family:42s} {len(sites.blocks)} blocks {wrong or ''}", flush=True)
    return {
        "model": FAMILIES[family],
        "takes": takes(sites),
        "blocks": len(sites.blocks),
        "layout": sites.blocks[0].layout if sites.blocks else None,
        "unproven": wrong,
        "seconds": round(time.monotonic() - start),
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
