"""Many runs, one table: methods × seeds on one backbone and one dataset, finished runs never run again."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from petune.config import Config
from petune.errors import PetuneError, Stopped, UsageError, near_names
from petune.files import replace_file
from petune.report import COLUMNS, cells, markdown, picture
from petune.results import RunResult
from petune.run import RunConfig, default_name, run
from petune.rundir import claimed
from petune.text import html_table
from petune.train import Event, Note


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
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    lrs: dict[str, Annotated[float, Field(gt=0)]] = {}
    run: RunConfig = RunConfig()
    output: Path | None = None

    @field_validator("methods", "seeds")
    @classmethod
    def _each_once(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        twice = sorted({str(v) for v in value if value.count(v) > 1})
        if twice:
            raise ValueError(f"each may stand once, but {', '.join(twice)} stands twice")
        return value

    @model_validator(mode="after")
    def _lrs_of_methods(self) -> Self:
        for name in self.lrs:
            if name not in self.methods:
                raise ValueError(
                    f"lrs must name methods of the comparison, but {name!r}{near_names(name, self.methods)}"
                )
        return self


@dataclass(frozen=True)
class RunStarted:
    """The next run begins, or was finished before (`done`)."""

    method: str
    seed: int
    index: int
    total: int
    done: bool


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


class Comparison(Config):
    """The table; saved as `compare.json`, with `compare.md` and `compare.svg` beside it."""

    config: CompareConfig
    rows: tuple[Row, ...]
    backbone: str
    weights: str
    provenance: dict[str, Any]
    output: str

    def _repr_html_(self) -> str:
        """How a notebook shows it."""
        rows = [cells(row.model_dump(mode="json")) for row in self.rows]
        return html_table(rows, COLUMNS, f"{self.backbone}, weights {self.weights}, on {self.config.run.dataset}")


def compare(
    config: CompareConfig | None = None,
    *,
    watch: Callable[[Event | RunStarted], None] = lambda event: None,
    **fields: Any,
) -> Comparison:
    """Run every method with every seed; a method that fails becomes a row with its reason.

    Args:
        config: The comparison, or the CompareConfig that `fields` make:
            `petune.compare(methods=("linear", "vpt"), run={"dataset": "digits"})`.
        watch: Told of every run, step, epoch and note.

    Raises:
        UsageError: The directory holds another comparison, or is in use.
        Stopped: A signal came; started again the comparison goes on.
    """
    config = config or CompareConfig.build(fields, "petune.compare(...)")
    place = config.output or Path("runs") / f"compare-{config.run.backbone}-{config.run.dataset}".replace("/", "_")
    command = "petune compare --config compare.yaml"
    # More methods or seeds may be added to a comparison later; each run guards its own configuration.
    held = RunConfig.model_construct(**{**dict(config.run), "output": None, "resume": False})
    with claimed(place, held, resume=True, command=command):
        rows, finished = [], []
        total = len(config.methods) * len(config.seeds)
        for index, method in enumerate(config.methods):
            results, reason = _runs_of(method, config, place, watch, index * len(config.seeds), total)
            rows.append(summarise(method, results, reason))
            finished += results
        return _write(config, rows, finished, place)


def summarise(method: str, results: Sequence[RunResult], reason: str = "") -> Row:
    """One row from a method's finished runs."""
    if reason or not results:
        return Row(method=method, status="failed", reason=reason or "no run finished")
    first = results[0]
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


def _runs_of(
    method: str,
    config: CompareConfig,
    place: Path,
    watch: Callable[[Event | RunStarted], None],
    before: int,
    total: int,
) -> tuple[list[RunResult], str]:
    results: list[RunResult] = []
    for number, seed in enumerate(config.seeds):
        one = config.run.model_copy(update={"method": method, "seed": seed, "resume": True, "output": None})
        train = one.train.model_copy(update={"lr": config.lrs.get(method, one.train.lr)})
        one = one.model_copy(update={"output": place / default_name(one), "train": train})
        watch(RunStarted(method, seed, before + number, total, RunResult.exists(place / default_name(one))))
        try:
            results.append(run(one, watch=watch))
        except (Stopped, UsageError):
            raise
        except PetuneError as error:
            watch(Note(f"{method}, seed {seed} failed: {error}"))
            return results, f"{type(error).__name__}: {error}"
    return results, ""


def _write(config: CompareConfig, rows: list[Row], finished: list[RunResult], place: Path) -> Comparison:
    comparison = Comparison(
        config=config,
        rows=tuple(rows),
        backbone=finished[0].backbone_full_name if finished else config.run.backbone,
        weights=finished[0].weights if finished else config.run.weights,
        provenance=finished[-1].provenance if finished else {},
        output=str(place),
    )
    plain = comparison.model_dump(mode="json")
    replace_file(place / "compare.json", (comparison.model_dump_json(indent=1) + "\n").encode())
    replace_file(place / "compare.md", markdown(plain).encode())
    replace_file(place / "compare.svg", picture(plain))
    return comparison
