"""Many runs, one table: methods × seeds on one backbone and one dataset, finished runs never run again."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from petune.backbones.create import check_weights
from petune.base.arguments import check_watch
from petune.base.config import Config, UserPath
from petune.base.distributed import init_group
from petune.base.errors import PetuneError, UsageError, did_you_mean
from petune.base.files import replace_file
from petune.base.text import html_table
from petune.injector.registry import build_tuner
from petune.injector.tuner import TunerConfig
from petune.runner.events import RunStarted, Watch
from petune.runner.executors import Executor, Started, choose_executor
from petune.runner.report.tables import COLUMNS, cells, image, markdown, seeds_by_method
from petune.runner.result import RunResult
from petune.runner.run_config import RunConfig
from petune.runner.run_dir import COMPARE_FILE, COMPARE_TABLE, CONFIG_FILE, check_config, open_run_dir
from petune.runner.run_inputs import check_inputs
from petune.runner.run_name import directory_name, run_name
from petune.training.events import Event, Note
from petune.training.run_files import METRICS_FILE

PAGE_FILE, IMAGE_FILE = "compare.md", "compare.svg"
FILES = (COMPARE_TABLE, COMPARE_FILE, PAGE_FILE, IMAGE_FILE)


class CompareConfig(Config):
    """Which runs to compare.

    Attributes:
        methods: As for `--method`, options in place allowed; each once.
        seeds: Each method runs once with each.
        lrs: Peak learning rates by method, chosen on validation, for those that should not take their recipe's:
            `--set lrs.full=1e-3`.
        run: What all runs share; its method, seed and output are not used.
        output: The directory; None is `runs/compare-BACKBONE-DATASET`. Started again it goes on.
    """

    methods: tuple[str, ...] = Field(min_length=1)
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field((0,), min_length=1)
    lrs: dict[str, Annotated[float, Field(gt=0, le=1e4)]] = {}
    run: RunConfig = RunConfig()
    output: UserPath | None = None

    @field_validator("methods", "seeds")
    @classmethod
    def _each_once(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        twice = sorted({str(v) for v in value if value.count(v) > 1})
        if twice:
            raise ValueError(f"each may stand once, but {', '.join(twice)} stands twice")
        return value

    @field_validator("lrs")
    @classmethod
    def _of_methods(cls, value: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        methods = info.data.get("methods", value)  # if those are wrong themselves, that is said
        for name in value:
            if name not in methods:
                raise ValueError(f"{name} is not a method of this comparison{did_you_mean(name, methods)}")
        return value


class Row(Config):
    """One method over all seeds. A method that failed has a reason and no numbers.

    Attributes:
        top1_mean, top1_std: Percent on test; the sample standard deviation over seeds, None for one seed.
        lr: Peak learning rate, from the recipe or as given.
        images_per_s, peak_memory_bytes, time_s: Mean, largest, and sum over the seeds.
    """

    method: str
    status: Literal["done", "failed"]
    reason: str = ""
    seeds: tuple[int, ...] = ()
    tuned: int | None = None
    head: int | None = None
    total: int | None = None
    percent_of_total: float | None = None
    percent_of_backbone: float | None = None
    adapter_bytes: int | None = None
    top1: tuple[float, ...] = ()
    lr: float | None = None
    top1_mean: float | None = None
    top1_std: float | None = None
    top5_mean: float | None = None
    top5_std: float | None = None
    val_top1_mean: float | None = None
    images_per_s: float | None = None
    peak_memory_bytes: int | None = None
    time_s: float | None = None

    @model_validator(mode="after")
    def _done_has_numbers(self) -> Self:
        alone = {"top1_std", "top5_std", "val_top1_mean"}  # of one seed, and of a run without val
        missing = [key for key, value in self if value in (None, ()) and key not in alone]
        if self.status == "done" and missing:
            raise ValueError(f"a method that is done must have {', '.join(missing)}")
        return self


ORIGIN_KEYS = ("device", "threads", "precision", "versions", "git")
"""What of the provenance tells one Origin from another."""


class Origin(Config):
    """What was measured where: seeds by method, and their provenance."""

    runs: dict[str, tuple[int, ...]]
    provenance: dict[str, Any]


class Comparison(Config):
    """The table; saved as `compare.json`, with `compare.md` and `compare.svg` beside it.

    Attributes:
        provenance: Of the last run.
        origins: Where not all runs have the same machine, threads, number format, versions and commit: of each.
    """

    config: CompareConfig
    rows: tuple[Row, ...]
    backbone: str
    weights: str
    provenance: dict[str, Any]
    origins: tuple[Origin, ...] = ()
    output: str

    def _repr_html_(self) -> str:
        """How a notebook shows it."""
        rows = [cells(row.model_dump(mode="json")) for row in self.rows]
        return html_table(rows, COLUMNS, f"{self.backbone}, weights {self.weights}, on {self.config.run.dataset}")


def compare(
    config: CompareConfig | None = None,
    *,
    executor: str | Executor = "serial",
    watch: Watch = lambda event: None,
    **fields: Any,
) -> Comparison:
    """Run every method with every seed; a method that fails becomes a row with its reason.

    Args:
        config: The comparison, or the CompareConfig that `fields` make:
            `petune.compare(methods=("linear", "vpt"), run={"dataset": "digits"})`.
        executor: Where the runs are done, as `ray:cpus=2`; see `petune.executors`.
        watch: Told of every run, step, epoch and note.

    Raises:
        MissingExtra: The executor's package is not installed.
        WeightsUnavailable: The backbone's are not to be had.
        UsageError: The directory holds another comparison, or is in use, or one of its runs was asked for otherwise.
        Stopped: A signal came; started again the comparison goes on.
    """
    check_watch("petune.compare", watch)
    chosen = choose_executor(executor)
    config = CompareConfig.from_call(config, fields, "petune.compare(...)")
    place = config.output or Path("runs") / compare_name(config)
    options = _checked(config, place)
    command = f"petune compare --config {COMPARE_FILE}"
    asked = config.model_copy(update={"output": None})  # where the file lies, wherever that is moved to
    # More methods or seeds may be added to a comparison later; each run guards its own configuration.
    unused = {key: RunConfig.model_fields[key].default for key in ("method", "seed", "output", "resume")}
    held = RunConfig.model_construct(**{**dict(config.run), **unused})
    group = init_group()
    runs = [(method, _one(config, method, seed, place)) for method in config.methods for seed in config.seeds]
    if not all(one.output and RunResult.exists(one.output) for _, one in runs):
        group.main_first(lambda: check_weights(config.run.backbone, config.run.weights))
    with group.on_main(open_run_dir(place, held, resume=True, command=command, tables=FILES)):
        group.broadcast(lambda: _hold_runs([one for _, one in runs]))
        group.broadcast(lambda: replace_file(place / COMPARE_FILE, f"# {command}\n{asked.to_yaml()}".encode()))
        group.broadcast(lambda: check_inputs(place, config.run.dataset, config.run.weights, methods=options))
        left_out = group.broadcast(lambda: _left_out(config, place))
        if left_out:
            watch(Note(f"the table will lack {', '.join(left_out)}, not asked for now; finished runs stay in {place}"))
        finished, failed = _done(runs, chosen, watch)
        rows = [_row(method, finished, failed.get(method, "")) for method in config.methods]
        return group.broadcast(lambda: _write(config, rows, finished, place))


def compare_name(config: CompareConfig) -> str:
    """The directory name of a comparison that names none."""
    return directory_name("compare", config.run.backbone, config.run.dataset)


def _done(
    runs: Sequence[tuple[str, RunConfig]], chosen: Executor, watch: Watch
) -> tuple[list[RunResult], dict[str, str]]:
    """Do the runs: the results of those that finished, in their order, and the reasons of the methods that failed."""
    results: dict[int, RunResult] = {}
    failed: dict[str, str] = {}

    def started(event: Event | Started) -> None:
        if isinstance(event, Started):
            method, one = runs[event.index]
            done = one.output is not None and RunResult.exists(one.output)
            watch(RunStarted(method, one.seed, event.index, len(runs), done))
        else:
            watch(event)

    # a method is failed with its first seed: the others would be for nothing
    for index, outcome in chosen([one for _, one in runs], lambda one: one.method not in failed, started):
        method, one = runs[index]
        if isinstance(outcome, RunResult):
            results[index] = outcome
        else:
            failed.setdefault(method, outcome.reason)
            watch(Note(f"{method}, seed {one.seed} failed: {outcome.reason}"))
    return [results[index] for index in sorted(results)], failed


def summarise(method: str, results: Sequence[RunResult], reason: str = "") -> Row:
    """One row from a method's finished runs."""
    if reason or not results:
        return Row(method=method, status="failed", reason=reason or "no run finished")
    first = results[0]
    unlike = [r for r in results if (r.lr, r.tuned, r.head) != (first.lr, first.tuned, first.head)]
    if unlike:
        reason = (
            f"seeds {first.seed} and {unlike[0].seed} must be alike, but {first.tuned:,} and {unlike[0].tuned:,} "
            f"parameters train at rates of {first.lr:g} and {unlike[0].lr:g}: the method's package has changed between "
            f"them. Take away {first.output} or {unlike[0].output}"
        )
        return Row(method=method, status="failed", reason=reason)
    top1, top5 = tuple(r.top1 for r in results), tuple(r.top5 for r in results)
    vals = [r.val_top1 for r in results if r.val_top1 is not None]
    return Row(
        method=method,
        status="done",
        seeds=tuple(r.seed for r in results),
        tuned=first.tuned,
        head=first.head,
        total=first.total,
        percent_of_total=first.percent_of_total,
        percent_of_backbone=first.percent_of_backbone,
        adapter_bytes=first.adapter_bytes,
        lr=first.lr,
        top1=top1,
        top1_mean=statistics.fmean(top1),
        top1_std=statistics.stdev(top1) if len(top1) > 1 else None,
        top5_mean=statistics.fmean(top5),
        top5_std=statistics.stdev(top5) if len(top5) > 1 else None,
        val_top1_mean=statistics.fmean(vals) if vals else None,
        images_per_s=statistics.fmean(r.images_per_s for r in results),
        peak_memory_bytes=max(r.peak_memory_bytes for r in results),
        time_s=sum(r.time_s for r in results),
    )


def origins_of(results: Sequence[RunResult]) -> tuple[Origin, ...]:
    """The places where the runs were measured; empty where it is one."""
    found: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any]]] = {}
    for result in results:
        same = {key: result.provenance.get(key) for key in ORIGIN_KEYS}
        runs, _ = found.setdefault(json.dumps(same, sort_keys=True), ({}, same))
        runs[result.method] = (*runs.get(result.method, ()), result.seed)
    origins = [Origin(runs=runs, provenance=provenance) for runs, provenance in found.values()]
    return tuple(origins) if len(origins) > 1 else ()


def _checked(config: CompareConfig, place: Path) -> dict[str, TunerConfig]:
    """Hold what is known to be wrong before anything trains; return the methods' options.

    Raises:
        UsageError: A method cannot be built, or the directory holds a run, or a table that came from elsewhere.
    """
    options: dict[str, TunerConfig] = {}
    for method in config.methods:
        try:
            options[method] = build_tuner(method).config
        except UsageError:
            raise
        except PetuneError:  # a broken package: a row that says so
            continue
    if RunResult.exists(place) or (place / METRICS_FILE).exists():
        raise UsageError(f"a comparison needs a directory of its own, but {place} holds a run; name another --output")
    foreign = [n for n in FILES if (place / n).exists()]
    if foreign and not (place / CONFIG_FILE).exists():
        raise UsageError(f"{place}/{foreign[0]} was not made by a comparison there, and is kept; name another --output")
    return options


def _hold_runs(runs: Sequence[RunConfig]) -> None:
    """Hold that those of them that have begun were asked for alike, before another one trains."""
    for one in runs:
        if one.output is not None:
            check_config(one.output, one)


def _left_out(config: CompareConfig, place: Path) -> list[str]:
    """Methods and seeds of the table that is there, which the one to come will not have."""
    try:
        rows = json.loads((place / COMPARE_TABLE).read_text(encoding="utf-8"))["rows"]
        gone = {row["method"]: [seed for seed in row["seeds"] if seed not in config.seeds] for row in rows}
    except (OSError, ValueError, LookupError, TypeError):
        return []
    return [
        seeds_by_method({method: seeds}) if method in config.methods else method
        for method, seeds in gone.items()
        if seeds or method not in config.methods
    ]


def _one(config: CompareConfig, method: str, seed: int, place: Path) -> RunConfig:
    """The run of a method with a seed, in its own directory under `place`."""
    one = config.run.model_copy(update={"method": method, "seed": seed, "resume": True, "output": None})
    train = one.train.model_copy(update={"lr": config.lrs.get(method, one.train.lr)})
    return one.model_copy(update={"output": place / run_name(one), "train": train})


def _row(method: str, finished: Sequence[RunResult], reason: str) -> Row:
    return summarise(method, [result for result in finished if result.method == method], reason)


def _write(config: CompareConfig, rows: list[Row], finished: list[RunResult], place: Path) -> Comparison:
    comparison = Comparison(
        config=config,
        rows=tuple(rows),
        backbone=finished[0].backbone_full_name if finished else config.run.backbone,
        weights=finished[0].weights if finished else config.run.weights,
        provenance=finished[-1].provenance if finished else {},
        origins=origins_of(finished),
        output=str(place),
    )
    write_table(comparison, place)
    return comparison


def write_table(comparison: Comparison, place: Path) -> None:
    """Write `compare.json`, `compare.md` and `compare.svg` into a directory that is there."""
    plain = comparison.model_dump(mode="json")
    replace_file(place / COMPARE_TABLE, (comparison.model_dump_json(indent=1) + "\n").encode())
    replace_file(place / PAGE_FILE, markdown(plain).encode())
    replace_file(place / IMAGE_FILE, image(plain))
