"""Run a suite of benchmarks: choose each method's rate on val, compare the methods, hold the numbers to a range.

    python benchmarks/suite.py few-shot                      # all of benchmarks/suites/few-shot.yaml
    python benchmarks/suite.py few-shot --smoke              # the same at a size of a minute, offline
    python benchmarks/suite.py few-shot --only few-shot-10   # some pieces, or some methods, by name
    python benchmarks/suite.py few-shot --seeds 0            # a first seed of each
    python benchmarks/suite.py few-shot --finished --keep    # train nothing; keep what is finished in results/
    python benchmarks/suite.py few-shot --kept-rates --keep  # go on with what another machine kept there

Everything that trains is `petune.pretrain`, `petune.sweep` and `petune.compare`: finished runs are not run again, and
what was stopped or killed goes on with the same command. Exit code 1 where a number is out of its range, or a
method failed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from joined import joined
from pydantic import Field

import petune
from petune.base.config import Config
from petune.base.files import replace_file
from petune.base.yaml_values import read_yaml
from petune.cli.progress import Progress
from petune.runner.comparison import Comparison
from petune.runner.executors import RUN, Executor, Work
from petune.runner.file_names import SWEEP_TABLE
from petune.runner.report.tables import comparison_page
from petune.runner.result import RunResult
from petune.runner.run_name import directory_name

HERE = Path(__file__).resolve().parent
SUITES, RESULTS = HERE / "suites", HERE / "results"


class Expected(Config):
    """Top-1 on test in percent, mean over the seeds; or for `A - B` the difference of two methods in points.

    Attributes:
        top1: What was measured, or is aimed at; `source` says which.
        range: From and to where a number is as expected.
    """

    top1: float
    range: tuple[float, float]
    source: str = ""


class Rates(Config):
    """The learning rates to try for each method, on val, with one seed.

    Attributes:
        values: By method; `default` for those that are not named.
        run: What the trials have other than the comparison, as fewer epochs.
    """

    values: dict[str, tuple[float, ...]]
    run: dict[str, Any] = {}


class Piece(Config):
    """A pretraining where there is one, then the rates, then the comparison; as `petune.pretrain` and so on take it."""

    pretrain: dict[str, Any] | None = None
    rates: Rates | None = None
    compare: dict[str, Any]


class Suite(Config):
    """A file of `suites/`.

    Attributes:
        command: What runs it.
        about: What it shows, on what it runs how long.
        expected: By piece, then by method.
        pieces: In their order.
        smoke: Laid over every piece, or those it names as `pieces`; with an `expected` of its own for each.
    """

    command: str
    about: str
    expected: dict[str, dict[str, Expected]]
    pieces: dict[str, Piece] = Field(min_length=1)
    smoke: dict[str, Any]


@dataclass(frozen=True)
class Check:
    """A number beside what was expected; `value` is None where there is none (yet)."""

    what: str
    value: float | None
    expected: float
    low: float
    high: float

    @property
    def good(self) -> bool:
        """Whether it is in its range."""
        return self.value is not None and self.low <= self.value <= self.high

    def __str__(self) -> str:
        said = "in range" if self.good else "missing" if self.value is None else "OUT OF RANGE"
        value = "–" if self.value is None else f"{self.value:.2f}"
        return f"{self.what}: {value}, expected {self.expected:g} within {self.low:g} to {self.high:g}: {said}"


def read_suite(name: str, smoke: bool = False) -> Suite:
    """The suite of that name, at its smoke size if asked for."""
    values = read_yaml(SUITES / f"{name}.yaml")
    if smoke:
        over = dict(values["smoke"])
        expected = over.pop("expected")
        names = over.pop("pieces", list(values["pieces"]))
        values["pieces"] = {name: laid_over(values["pieces"][name], over) for name in names}
        values["expected"] = dict.fromkeys(values["pieces"], expected)
    return Suite.build(values, f"{name}.yaml")


def laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with the values of `above`, key by key; what `below` has no use for (a pretraining) stays out."""
    merged = dict(below)
    for key, value in above.items():
        if key in {"pretrain", "rates"} and not below.get(key):
            continue
        inner = merged.get(key)
        merged[key] = laid_over(inner, value) if isinstance(value, dict) and isinstance(inner, dict) else value
    return merged


def run_piece(
    piece: Piece,
    place: Path,
    methods: tuple[str, ...],
    watch: Any,
    executor: str | Executor = "serial",
    known: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Pretrain, choose rates, compare; what is finished is read. Returns what suite.json holds beside the checks.

    Args:
        known: Rates that were chosen before, by method, as this function returns them.
    """
    pretraining = pretrain_config(piece, place)
    pretrained = petune.pretrain(pretraining, watch=watch).model_dump(mode="json") if pretraining else None
    configs = {method: rate_config(piece, place, method) for method in methods if piece.rates}
    known = known or {}
    rates = {m: known.get(m) or chosen_rate(config, watch, executor) for m, config in configs.items()}
    lrs = {method: rate["lr"] for method, rate in rates.items()}
    comparison = petune.compare(compare_config(piece, place, methods, lrs), executor=executor, watch=watch)
    other = [row.method for row in comparison.rows if row.method in lrs and row.lr not in {None, lrs[row.method]}]
    if other:
        raise SystemExit(
            f"finished runs of {', '.join(other)} had another rate than was chosen; remove them in {place}"
        )
    return {"pretrain": pretrained, "rates": rates, "compare": comparison.model_dump(mode="json")}


def only_finished(
    configs: Sequence[petune.RunConfig], wanted: Any, watch: Any, work: Work = RUN
) -> Iterator[tuple[int, Any]]:
    """The executor that does nothing: what is finished is read, the rest is left out."""
    for index, config in enumerate(configs):
        found = work.read_result(config)
        if found is not None:
            yield index, found


def begun(place: Path, methods: tuple[str, ...], seeds: list[int]) -> tuple[str, ...]:
    """Those of the methods that have a finished run in the comparison."""
    results = [json.loads(file.read_text()) for file in (place / "compare").glob("*/result.json")]
    done = {result["method"] for result in results if result["seed"] in seeds}
    return tuple(method for method in methods if method in done)


def swept(piece: Piece, place: Path, method: str) -> bool:
    """Whether the rate of the method was chosen here."""
    output = rate_config(piece, place, method).output
    return output is not None and (output / SWEEP_TABLE).exists()


def need_finished(piece: Piece, place: Path, methods: tuple[str, ...], known: Mapping[str, Any]) -> None:
    """Hold that nothing is left to train, so that --finished trains nothing.

    Raises:
        SystemExit: A pretraining or a choice of rates is missing.
    """
    if piece.pretrain and not RunResult.exists(place / "pretrain"):
        raise SystemExit(f"--finished needs a finished pretraining, but there is none in {place / 'pretrain'}")
    without = [m for m in methods if piece.rates and m not in known and not swept(piece, place, m)]
    if without:
        raise SystemExit(f"--finished needs rates, but {place} and results/ have none of {', '.join(without)}")


def pretrain_config(piece: Piece, place: Path) -> petune.PretrainConfig | None:
    """The pretraining of the piece, if it has one."""
    if piece.pretrain is None:
        return None
    return petune.PretrainConfig.build(piece.pretrain | {"output": place / "pretrain", "resume": True}, "pretrain")


def rate_config(piece: Piece, place: Path, method: str) -> petune.SweepConfig:
    """The sweep of a method's rate, from the lowest to the highest."""
    assert piece.rates is not None
    values = sorted(piece.rates.values.get(method) or piece.rates.values["default"])
    run = laid_over(_shared(piece, place), piece.rates.run) | {"method": method}
    fields = {"search": {"train.lr": values}, "trials": len(values), "test": False, "run": run}
    return petune.SweepConfig.build(fields | {"output": place / "rates" / directory_name(method)}, f"rates of {method}")


def compare_config(
    piece: Piece, place: Path, methods: tuple[str, ...], lrs: Mapping[str, float]
) -> petune.CompareConfig:
    """The comparison of some methods, each with its rate."""
    fields = {"methods": methods, "run": _shared(piece, place), "lrs": dict(lrs), "output": place / "compare"}
    return petune.CompareConfig.build(piece.compare | fields, "compare")


def _shared(piece: Piece, place: Path) -> dict[str, Any]:
    weights = {} if piece.pretrain is None else {"weights": str(place / "pretrain")}
    return piece.compare["run"] | weights


def chosen_rate(config: petune.SweepConfig, watch: Any, executor: str | Executor = "serial") -> dict[str, Any]:
    """The rate with the best top-1 on val; test is not read. `edge` says that it was the lowest or highest tried."""
    table = petune.sweep(config, executor=executor, watch=watch)
    if table.best is None:
        raise SystemExit(f"no rate worked for {config.run.method}: {table.rows[0].reason}")
    lr = float(table.params["train.lr"])
    rows = sorted(table.rows, key=lambda row: float(row.params["train.lr"]))
    tried = {f"{row.params['train.lr']:g}": row.val_top1 for row in rows}
    ends = {min(map(float, tried)), max(map(float, tried))}
    return {"lr": lr, "tried": tried, "edge": len(tried) > 1 and lr in ends}


def checks_of(expected: Mapping[str, Expected], comparison: Mapping[str, Any]) -> list[Check]:
    """Every expected number beside the measured one."""
    rows = {row["method"]: row for row in comparison["rows"] if row["status"] == "done"}
    checks = []
    for what, one in expected.items():
        first, *other = [rows.get(name.strip()) for name in what.split(" - ")]
        value = difference(first, other[0]) if other else first["top1_mean"] if first else None
        checks.append(Check(what, value, one.top1, *one.range))
    return checks


def difference(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> float | None:
    """By how much the first row's top-1 is higher, over the seeds of both; None where there are none."""
    tops = [dict(zip(row["seeds"], row["top1"], strict=True)) if row else {} for row in (one, other)]
    seeds = tops[0].keys() & tops[1].keys()
    return sum(tops[0][seed] - tops[1][seed] for seed in seeds) / len(seeds) if seeds else None


def chosen(suite: Suite, only: list[str]) -> dict[str, tuple[str, ...]]:
    """The methods to run of each piece: all, or those that are named, or whose piece is named."""
    methods = {name: tuple(piece.compare["methods"]) for name, piece in suite.pieces.items()}
    known = {*methods, *(method for several in methods.values() for method in several)}
    unknown = [word for word in only if word not in known]
    if unknown:
        raise SystemExit(f"--only takes pieces and methods of the suite, but not {unknown}: {', '.join(sorted(known))}")
    some = [word for word in only if word not in methods]
    pieces = [word for word in only if word in methods] or list(methods)
    wanted = {piece: tuple(m for m in methods[piece] if not some or m in some) for piece in pieces}
    return {piece: several for piece, several in wanted.items() if several}


def kept(piece: str) -> tuple[Comparison | None, dict[str, Any]]:
    """What is committed of a piece: the table, and what stands in its suite.json; None and nothing at first."""
    place = RESULTS / piece
    if not (place / "compare.json").exists():
        return None, {"rates": {}, "pretrain": None}
    record: dict[str, Any] = json.loads((place / "suite.json").read_bytes())
    return Comparison.read(place), record


def keep(done: dict[str, Any], piece: str, order: Sequence[str]) -> dict[str, Any]:
    """Join the results of a piece to those that are committed, and write them there. Returns all of them."""
    new, (old, record) = Comparison.model_validate(done["compare"]), kept(piece)
    same = record["pretrain"] == done["pretrain"] if done["pretrain"] else None
    table = new if old is None else joined(old, new, order, same)
    lrs = {row.method: row.lr for row in table.rows}
    both = [*record["rates"].items(), *done["rates"].items()]
    place = RESULTS / piece
    place.mkdir(parents=True, exist_ok=True)
    table.write(place)
    rates = {method: rate for method, rate in both if rate["lr"] == lrs.get(method)}
    plain = table.model_dump(mode="json")
    return done | {"compare": plain, "rates": {method: rates[method] for method in lrs if method in rates}}


def write_record(place: Path, suite: Suite, piece: str, args: argparse.Namespace, done: dict[str, Any]) -> list[Check]:
    """suite.json: what a piece chose, and its numbers beside the expected ones. Returns those."""
    methods = set(done["compare"]["config"]["methods"])
    expected = {what: one for what, one in suite.expected.get(piece, {}).items()
                if set(map(str.strip, what.split(" - "))) <= methods}  # fmt: skip
    checks = checks_of(expected, done["compare"])
    record = {
        "suite": args.name, "piece": piece, "smoke": args.smoke, "command": suite.command, "about": suite.about,
        "pretrain": done["pretrain"], "rates": done["rates"],
        "checks": [asdict(check) | {"good": check.good} for check in checks],
    }  # fmt: skip
    replace_file(place / "suite.json", (json.dumps(record, indent=1) + "\n").encode())
    return checks


def show(done: dict[str, Any], checks: Sequence[Check]) -> None:
    """Print the table, the rates and the checks."""
    print(comparison_page(done["compare"]).partition("\n![")[0])
    for method, rate in done["rates"].items():
        edge = "; AT THE EDGE of what was tried" if rate["edge"] else ""
        print(f"{method}: rate {rate['lr']:g}, val {rate['tried']}{edge}")
    print("\n".join(map(str, checks)), flush=True)


def main(words: list[str]) -> NoReturn:
    """Run what is asked for, print tables and checks."""
    args = _arguments(words)
    suite = read_suite(args.name, args.smoke)
    top = args.output or Path("runs") / "suites" / (args.name + ("-smoke" if args.smoke else ""))
    good = True
    with Progress() as watch:
        for piece, methods in chosen(suite, args.only).items():
            place, config = top / piece, suite.pieces[piece]
            seeds = args.seeds or config.compare["seeds"]
            config = config.model_copy(update={"compare": config.compare | {"seeds": seeds}})
            if args.finished and not (methods := begun(place, methods, seeds)):
                continue
            known = kept(piece)[1]["rates"] if args.kept_rates or args.finished else {}
            if args.finished:  # rates that were chosen here come first
                known = {m: rate for m, rate in known.items() if args.kept_rates or not swept(config, place, m)}
                need_finished(config, place, methods, known)
            done = run_piece(config, place, methods, watch, only_finished if args.finished else "serial", known)
            checks = write_record(place, suite, piece, args, done)
            good &= all(check.good for check in checks)
            good &= all(row["status"] == "done" for row in done["compare"]["rows"])
            show(done, checks)
            if args.keep:
                try:
                    whole = keep(done, piece, config.compare["methods"])
                    write_record(RESULTS / piece, suite, piece, args, whole)
                except ValueError as error:  # the other pieces go on
                    print(f"{piece} is not kept: {error}", file=sys.stderr)
                    good = False
    raise SystemExit(0 if good else 1)


def _arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(file.stem for file in SUITES.glob("*.yaml")))
    parser.add_argument("--smoke", action="store_true", help="the size of a minute, offline")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="pieces, or methods of them")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="instead of the suite's")
    parser.add_argument("--finished", action="store_true", help="train nothing; take what is finished")
    parser.add_argument("--output", type=Path, metavar="DIR", help="instead of runs/suites/NAME")
    parser.add_argument("--keep", action="store_true", help="join the results to those in benchmarks/results/")
    parser.add_argument("--kept-rates", action="store_true", help="choose no rate that was chosen for those already")
    args = parser.parse_args(words)
    if args.keep and args.smoke:
        parser.error("--keep is for results; a smoke run has none")
    return args


if __name__ == "__main__":
    main(sys.argv[1:])
