"""Compare petune's methods with their authors' code: equal random weights, outputs and gradients in float64.

    python benchmarks/fidelity.py CLONES           # benchmarks/results/fidelity.json, then docs/fidelity.md
    python benchmarks/fidelity.py CLONES ssf fact  # these methods only

CLONES is a folder outside this repository with one clone for each repository of fidelity_cases.py, named OWNER+NAME:

    git clone https://github.com/ShoufaChen/AdaptFormer CLONES/ShoufaChen+AdaptFormer

A method without a clone, or that is not named, keeps the rows of an earlier run, with their commit, date and versions.
Takes about five minutes and 2 GB on one core.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from fidelity_cases import CASES, Case
from fidelity_page import RESULT, write_page
from fidelity_pairs import Built
from official_code import clone_of, commit_of, extracted
from result_files import write_json
from torch import Tensor


def main(clones: Path, methods: list[str]) -> int:
    """Compare what there are clones of, keep the other rows, and write both files; 1 if a comparison failed."""
    old = json.loads(RESULT.read_text(encoding="utf-8"))["rows"] if RESULT.exists() else []
    rows, failed = [], False
    for case in CASES:
        clone = clone_of(clones, case.repository)
        if clone is not None and (not methods or case.method.partition(":")[0] in methods):
            try:
                rows.append(measured(case, clone))
                print(rows[-1], flush=True)
                continue
            except Exception as error:  # the authors' code may not run with today's libraries
                failed = True
                print(f"{case.method}, {case.of}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        rows += [row for row in old if _key(row) == (case.method, case.repository, case.of)]
    known = {_key(row) for row in rows}
    rows += [row for row in old if _key(row) not in known and not row["commit"]]
    write_json(RESULT, {"rows": rows})
    write_page()
    return int(failed)


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["method"], row["repository"], row["of"]


def measured(case: Case, clone: Path) -> dict[str, Any]:
    """Return the row of a comparison."""
    with extracted(clone, case.folder) as root, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = case.build(root)
        fill(built)
        output, gradient, merged = compared(built)
    return {
        "method": case.method,
        "repository": case.repository,
        "commit": commit_of(clone),
        "of": case.of,
        "output": output,
        "gradient": gradient,
        "merged": merged,
        "note": case.note,
        "date": datetime.date.today().isoformat(),
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
    }


def fill(built: Built) -> None:
    """Give the authors' parameters random values, and petune's the same."""
    generator = torch.Generator().manual_seed(1)
    for official in {id(pair.official): pair.official for pair in built.pairs}.values():
        around = 1.0 if official.ndim == 1 and bool((official.detach() > 0.5).all()) else 0.0  # a scale stays near 1
        values = torch.randn(official.shape, generator=generator, dtype=torch.float64)
        official.data = around + values * (0.3 if around == 0 else 0.02)
    tuned = {id(tensor) for tensor in built.attachment.tuned.values()}
    assert {id(pair.own) for pair in built.pairs} <= tuned
    with torch.no_grad():
        for pair in built.pairs:
            pair.select(pair.own).copy_(pair.convert(pair.official))


def compared(built: Built) -> tuple[float, float, float | None]:
    """Return the relative differences of logits, of gradients, and of logits after both are merged."""
    generator = torch.Generator().manual_seed(2)
    x_BCHW = torch.randn(2, 3, 224, 224, generator=generator, dtype=torch.float64)
    weights = torch.randn(2, 10, generator=generator, dtype=torch.float64)
    outputs = []
    built.attachment.train(built.term is not None)
    for model, term in ((built.official, built.term), (built.own, lambda: built.attachment.loss(0))):
        with same_noise():
            outputs.append(model(x_BCHW))
        loss = (outputs[-1] * weights).sum()
        (loss + term() if built.term is not None else loss).backward()
    with torch.no_grad():
        gradients = [
            relative(pair.select(_gradient(pair.own)), pair.convert(_gradient(pair.official)))
            for pair in built.pairs
            if pair.own.grad is not None or pair.official.grad is not None
        ]
        gradient = float(torch.tensor(gradients, dtype=torch.float64).max())  # Python's max() can drop NaN
        unadapted = relative(plain(built, x_BCHW), outputs[0])
        assert unadapted > 1e-3, "the adapters do nothing"
        merged = None
        if built.merge is not None:
            built.merge()
            built.attachment.merge()
            merged = relative(built.own(x_BCHW), built.official(x_BCHW))
    return relative(outputs[1], outputs[0]), gradient, merged


@contextlib.contextmanager
def same_noise() -> Iterator[None]:
    """Draw exponential noise in float64 from one sequence, in whatever dtype and order of shapes it is asked for."""
    generator = np.random.default_rng(3)
    before = Tensor.exponential_
    Tensor.exponential_ = lambda value: torch.from_numpy(generator.exponential(size=value.shape))
    try:
        yield
    finally:
        Tensor.exponential_ = before


def plain(built: Built, x_BCHW: Tensor) -> Tensor:
    """Return petune's logits without the adapters."""
    with built.attachment.disabled():
        return built.own(x_BCHW)


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def relative(own: Tensor, official: Tensor) -> float:
    """Return the largest difference, divided by the largest value; NaN if there is one in either tensor."""
    difference = (own - official).abs().max()
    return float(difference / official.abs().max()) if difference else 0.0


if __name__ == "__main__":
    if not sys.argv[1:]:
        raise SystemExit(__doc__)
    torch.set_num_threads(1)
    raise SystemExit(main(Path(sys.argv[1]), sys.argv[2:]))
