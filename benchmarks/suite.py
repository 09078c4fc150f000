"""Run a suite of benchmarks: choose learning rates on val, compare the methods, check the numbers against ranges.

    python benchmarks/suite.py few-shot                      # all of benchmarks/suites/few-shot.yaml
    python benchmarks/suite.py few-shot --smoke              # the same in a minute, offline
    python benchmarks/suite.py few-shot --only few-shot-10   # some pieces or methods, by name
    python benchmarks/suite.py few-shot --seeds 0            # one seed of each
    python benchmarks/suite.py few-shot --finished --keep    # train nothing; copy finished runs to results/
    python benchmarks/suite.py few-shot --kept-rates --keep  # add to what another machine put there

Everything is trained by `petune.pretrain`, `petune.sweep` and `petune.compare`: finished runs are not repeated. If
interrupted, rerun the same command to resume. The exit code is 1 if a number is out of its range or a method failed.
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
from result_files import write_json
from suite_piece import Piece, compare_config, merged, pretrain_config, rate_config

import petune
from petune.base.config import Config
from petune.base.yaml_values import read_yaml
from petune.cli.progress import ProgressDisplay
from petune.runner.comparison import Comparison
from petune.runner.executors import RUN, Executor, Work
from petune.runner.file_names import SWEEP_TABLE
from petune.runner.migrations import updated_result
from petune.runner.report.tables import comparison_page
from petune.runner.result import RunResult

HERE = Path(__file__).resolve().parent
SUITES, RESULTS = HERE / "suites", HERE / "results"


class Expected(Config):
    """The expected top-1 on test in percent, mean over the seeds; for `A - B` the difference of two methods in points.

    Attributes:
        top1: An earlier measurement or a goal; `source` says which.
        range: The lowest and the highest value that are accepted.
    """

    top1: float
    range: tuple[float, float]
    source: str = ""


class Suite(Config):
    """A file of `suites/`.

    Attributes:
        command: The command that runs it.
        about: What it shows, and how long it takes.
        expected: By piece, then by method.
        pieces: In order.
        smoke: Overrides values of every piece, or of those in its `pieces`; has its own `expected`.
    """

    command: str
    about: str
    expected: dict[str, dict[str, Expected]]
    pieces: dict[str, Piece] = Field(min_length=1)
    smoke: dict[str, Any]


@dataclass(frozen=True)
class Check:
    """A measured number and its expected range; `value` is None if there is none yet."""

    what: str
    value: float | None
    expected: float
    low: float
    high: float

    @property
    def good(self) -> bool:
        """Return whether it is in its range."""
        return self.value is not None and self.low <= self.value <= self.high

    def __str__(self) -> str:
        verdict = "in range" if self.good else "missing" if self.value is None else "OUT OF RANGE"
        value = "–" if self.value is None else f"{self.value:.2f}"
        return f"{self.what}: {value}, expected {self.expected:g} within {self.low:g} to {self.high:g}: {verdict}"


def read_suite(name: str, smoke: bool = False) -> Suite:
    """Read the suite of that name; with `smoke`, at its smallest size."""
    values = read_yaml(SUITES / f"{name}.yaml")
    if smoke:
        overrides = dict(values["smoke"])
        expected = overrides.pop("expected")
        names = overrides.pop("pieces", list(values["pieces"]))
        values["pieces"] = {name: merged(values["pieces"][name], overrides) for name in names}
        values["expected"] = dict.fromkeys(values["pieces"], expected)
    return Suite.build(values, f"{name}.yaml")


def run_piece(
    piece: Piece,
    directory: Path,
    methods: tuple[str, ...],
    watch: Any,
    executor: str | Executor = "serial",
    known: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Pretrain, choose learning rates and compare; finished runs are read.

    Args:
        piece: What to run.
        directory: Where the runs are.
        methods: Those to compare.
        watch: Called with every event.
        executor: What does the runs.
        known: Learning rates that were chosen before, by method, as this function returns them.

    Returns:
        The results of pretraining, rates and comparison as plain data, as in suite.json.
    """
    pretraining = pretrain_config(piece, directory)
    pretrained = petune.pretrain(pretraining, watch=watch).model_dump(mode="json") if pretraining else None
    configs = {method: rate_config(piece, directory, method) for method in methods if piece.rates}
    known = known or {}
    rates = {m: known.get(m) or chosen_rate(config, watch, executor) for m, config in configs.items()}
    lrs = {method: rate["lr"] for method, rate in rates.items()}
    comparison = petune.compare(compare_config(piece, directory, methods, lrs), executor=executor, watch=watch)
    other = [row.method for row in comparison.rows if row.method in lrs and row.lr not in {None, lrs[row.method]}]
    if other:
        raise SystemExit(
            f"finished runs of {', '.join(other)} have another learning rate than the chosen one. Remove them from "
            f"{directory}"
        )
    return {"pretrain": pretrained, "rates": rates, "compare": comparison.model_dump(mode="json")}


def only_finished(
    configs: Sequence[petune.RunConfig], wanted: Any, watch: Any, work: Work = RUN
) -> Iterator[tuple[int, Any]]:
    """An executor that trains nothing: yield the results of finished runs."""
    for index, config in enumerate(configs):
        result = work.read_result(config)
        if result is not None:
            yield index, result


def methods_with_runs(directory: Path, methods: tuple[str, ...], seeds: list[int]) -> tuple[str, ...]:
    """Return the methods that have a finished run in the comparison."""
    results = [json.loads(file.read_text()) for file in (directory / "compare").glob("*/result.json")]
    done = {result["method"] for result in results if result["seed"] in seeds}
    return tuple(method for method in methods if method in done)


def has_sweep(piece: Piece, directory: Path, method: str) -> bool:
    """Return whether the learning rate of a method was chosen in this directory."""
    output = rate_config(piece, directory, method).output
    return output is not None and (output / SWEEP_TABLE).exists()


def need_finished(piece: Piece, directory: Path, methods: tuple[str, ...], known: Mapping[str, Any]) -> None:
    """Check that --finished has nothing to train.

    Raises:
        SystemExit: A pretraining or a learning rate is missing.
    """
    if piece.pretrain and not RunResult.exists(directory / "pretrain"):
        raise SystemExit(f"--finished needs a finished pretraining; there is none in {directory / 'pretrain'}")
    missing = [m for m in methods if piece.rates and m not in known and not has_sweep(piece, directory, m)]
    if missing:
        raise SystemExit(
            f"no learning rate for {', '.join(missing)} in {directory} or results/. Run without --finished"
        )


def chosen_rate(config: petune.SweepConfig, watch: Any, executor: str | Executor = "serial") -> dict[str, Any]:
    """Return the learning rate with the best top-1 on val; test is not read. `edge`: it is the lowest or highest."""
    table = petune.sweep(config, executor=executor, watch=watch)
    if table.best is None:
        raise SystemExit(f"every learning rate failed for {config.run.method}: {table.rows[0].reason}")
    lr = float(table.params["train.lr"])
    rows = sorted(table.rows, key=lambda row: float(row.params["train.lr"]))
    tried = {f"{row.params['train.lr']:g}": table.val(row) for row in rows}
    ends = {min(map(float, tried)), max(map(float, tried))}
    return {"lr": lr, "tried": tried, "edge": len(tried) > 1 and lr in ends}


def checks_of(expected: Mapping[str, Expected], comparison: Mapping[str, Any]) -> list[Check]:
    """Return a check for every expected number."""
    rows = {row["method"]: row for row in comparison["rows"] if row["status"] == "done"}
    checks = []
    for what, expectation in expected.items():
        first, *other = [rows.get(name.strip()) for name in what.split(" - ")]
        value = difference(first, other[0]) if other else first["mean"]["top1"] if first else None
        checks.append(Check(what, value, expectation.top1, *expectation.range))
    return checks


def difference(first: Mapping[str, Any] | None, second: Mapping[str, Any] | None) -> float | None:
    """Return top-1 of the first row minus that of the second, on the seeds that both have; None if there are none."""
    tops = [dict(zip(row["seeds"], row["metrics"]["top1"], strict=True)) if row else {} for row in (first, second)]
    seeds = tops[0].keys() & tops[1].keys()
    return sum(tops[0][seed] - tops[1][seed] for seed in seeds) / len(seeds) if seeds else None


def chosen(suite: Suite, only: list[str]) -> dict[str, tuple[str, ...]]:
    """Return the methods to run of each piece; `only` names methods, pieces or both, and nothing means all."""
    methods = {name: tuple(piece.compare["methods"]) for name, piece in suite.pieces.items()}
    known = {*methods, *(method for several in methods.values() for method in several)}
    unknown = [word for word in only if word not in known]
    if unknown:
        raise SystemExit(f"--only: no such piece or method: {', '.join(unknown)}. Known: {', '.join(sorted(known))}")
    some = [word for word in only if word not in methods]
    pieces = [word for word in only if word in methods] or list(methods)
    wanted = {piece: tuple(m for m in methods[piece] if not some or m in some) for piece in pieces}
    return {piece: several for piece, several in wanted.items() if several}


def committed(piece: str) -> tuple[Comparison | None, dict[str, Any]]:
    """Return the committed table of a piece and its suite.json; None and an empty record if there is none."""
    directory = RESULTS / piece
    if not (directory / "compare.json").exists():
        return None, {"rates": {}, "pretrain": None}
    record_file = directory / "suite.json"  # the table is written first: a kill can leave it alone
    record = json.loads(record_file.read_bytes()) if record_file.exists() else {"rates": {}, "pretrain": None}
    return Comparison.read(directory), record


def is_same_pretraining(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Compare results of a pretraining, which versions of petune write with different fields."""
    results = [None if values is None else RunResult.model_validate(updated_result(values)) for values in (one, other)]
    return results[0] == results[1]


def keep(done: dict[str, Any], piece: str, order: Sequence[str]) -> dict[str, Any]:
    """Merge the results of a piece into the committed ones, write them there and return them."""
    new = Comparison.model_validate(done["compare"])
    old, record = committed(piece)
    same = is_same_pretraining(record["pretrain"], done["pretrain"]) if done["pretrain"] else None
    table = new if old is None else joined(old, new, order, same)
    lrs = {row.method: row.lr for row in table.rows}
    both = [*record["rates"].items(), *done["rates"].items()]
    directory = RESULTS / piece
    directory.mkdir(parents=True, exist_ok=True)
    table.write(directory)
    rates = {method: rate for method, rate in both if rate["lr"] == lrs.get(method)}
    plain = table.model_dump(mode="json")
    return done | {"compare": plain, "rates": {method: rates[method] for method in lrs if method in rates}}


def write_record(
    directory: Path, suite: Suite, piece: str, args: argparse.Namespace, done: dict[str, Any]
) -> list[Check]:
    """Write suite.json: the chosen learning rates, and the checks, which are returned."""
    methods = set(done["compare"]["config"]["methods"])
    expected = {
        what: expectation
        for what, expectation in suite.expected.get(piece, {}).items()
        if {name.strip() for name in what.split(" - ")} <= methods
    }
    checks = checks_of(expected, done["compare"])
    record = {
        "suite": args.name,
        "piece": piece,
        "smoke": args.smoke,
        "command": suite.command,
        "about": suite.about,
        "pretrain": done["pretrain"],
        "rates": done["rates"],
        "checks": [asdict(check) | {"good": check.good} for check in checks],
    }
    write_json(directory / "suite.json", record)
    return checks


def show(done: dict[str, Any], checks: Sequence[Check]) -> None:
    """Print the table, the learning rates and the checks."""
    print(comparison_page(done["compare"]).partition("\n![")[0])
    for method, rate in done["rates"].items():
        edge = "; AT THE EDGE of the grid" if rate["edge"] else ""
        print(f"{method}: rate {rate['lr']:g}, val {rate['tried']}{edge}")
    print("\n".join(map(str, checks)), flush=True)


def main(words: list[str]) -> NoReturn:
    """Run pieces of a suite; print tables and checks."""
    args = _arguments(words)
    suite = read_suite(args.name, args.smoke)
    top = args.output or Path("runs") / "suites" / (args.name + ("-smoke" if args.smoke else ""))
    good = True
    with ProgressDisplay() as watch:
        for piece, methods in chosen(suite, args.only).items():
            directory, config = top / piece, suite.pieces[piece]
            seeds = args.seeds or config.compare["seeds"]
            config = config.model_copy(update={"compare": config.compare | {"seeds": seeds}})
            if args.finished and not (methods := methods_with_runs(directory, methods, seeds)):
                continue
            known = committed(piece)[1]["rates"] if args.kept_rates or args.finished else {}
            if args.finished:  # rates that were chosen here come first
                known = {m: rate for m, rate in known.items() if args.kept_rates or not has_sweep(config, directory, m)}
                need_finished(config, directory, methods, known)
            done = run_piece(config, directory, methods, watch, only_finished if args.finished else "serial", known)
            checks = write_record(directory, suite, piece, args, done)
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
    parser.add_argument("--smoke", action="store_true", help="run in a minute, offline")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="pieces or methods")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="instead of the suite's")
    parser.add_argument("--finished", action="store_true", help="train nothing; use finished runs")
    parser.add_argument("--output", type=Path, metavar="DIR", help="instead of runs/suites/NAME")
    parser.add_argument("--keep", action="store_true", help="merge the results into benchmarks/results/")
    parser.add_argument("--kept-rates", action="store_true", help="use the learning rates in benchmarks/results/")
    args = parser.parse_args(words)
    if args.keep and args.smoke:
        parser.error("--keep cannot be used with --smoke")
    return args


if __name__ == "__main__":
    main(sys.argv[1:])
