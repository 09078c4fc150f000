"""`petune run`: one method, one backbone, one dataset; with --seeds the same run several times."""

from __future__ import annotations

from typing import TYPE_CHECKING

from petune.base.distributed import init_group
from petune.cli.options import DryRun, Json, Seeds, Settings, Track, configured
from petune.cli.running import RUNS, check_tracker, place_of, resumable, watching
from petune.cli.terminal import print_facts, print_json

if TYPE_CHECKING:
    from petune.runner.result import RunResult
    from petune.runner.run_config import RunConfig


@configured()
def run(
    settings: Settings,
    *,
    seeds: Seeds = None,
    json: Json = False,
    dry_run: DryRun = False,
    track: Track = None,
) -> None:
    """Train one method, test it once and save its adapter.

    The epoch is chosen on a validation split; config, metrics, result and adapter lie in the run directory.
    """
    from petune.runner.run_config import RunConfig

    config = RunConfig.build(settings.values(), settings.source)
    several = settings.seeds(seeds)
    check_tracker(track)
    if dry_run:
        from petune.cli.dry_run import show_dry_run

        show_dry_run(config, (config.method,), as_json=json)
    elif several is not None:
        _run_seeds(config, several, json, track)
    else:
        _run_once(config, json, track, resume="resume" in settings.flags)


def _run_once(config: RunConfig, as_json: bool, track: str | None, *, resume: bool) -> None:
    from petune.runner.run import run as run_config
    from petune.runner.run_name import run_name

    place = init_group().broadcast(lambda: place_of(config, run_name(config), resume=resume))
    config = config.model_copy(update={"output": place})
    with resumable("run", place), watching(track, place) as watch:
        result = run_config(config, watch=watch)
    if as_json:
        print_json(result.model_dump(mode="json"))
    else:
        show_result(result)


def _run_seeds(config: RunConfig, seeds: tuple[int, ...], as_json: bool, track: str | None) -> None:
    from petune.cli.compare import run_comparison
    from petune.runner.compare import CompareConfig
    from petune.runner.run_name import run_name

    name = run_name(config).removesuffix(f"-seed{config.seed}") + "-seeds"
    place = config.output or RUNS / name
    values = {"methods": (config.method,), "seeds": seeds, "run": config, "output": place}
    run_comparison(CompareConfig.build(values, "the command line"), as_json=as_json, track=track)


def show_result(result: RunResult) -> None:
    """Print what a run yielded, a line each."""
    print_facts(result.facts())
