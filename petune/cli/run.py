"""`petune run`: one method, one backbone, one dataset; with --seeds the same run several times."""

from __future__ import annotations

from typing import TYPE_CHECKING

from petune.cli.options import DryRun, Json, Seeds, Settings, Track, configured, parse_seeds
from petune.cli.progress import Progress
from petune.cli.terminal import count, duration, percent, say, show_json, show_table, size
from petune.errors import UsageError

if TYPE_CHECKING:
    from petune.results import RunResult
    from petune.run import RunConfig


@configured()
def run(
    settings: Settings,
    *,
    seeds: Seeds = None,
    json: Json = False,
    dry_run: DryRun = False,
    track: Track = None,
) -> None:
    """Train a method on a backbone and a dataset, choose the epoch on val, test once, save the adapter."""
    from petune.run import RunConfig

    config = RunConfig.build(settings.values(), settings.source)
    if seeds is not None and "seed" in settings.flags:
        raise UsageError("give --seed for one run, or --seeds for several, not both")
    if dry_run:
        from petune.cli.inspect import show_dry_run

        show_dry_run(config, as_json=json)
    elif seeds is not None:
        _run_seeds(config, parse_seeds(seeds), json, track)
    else:
        _run_once(config, json, track)


def _run_once(config: RunConfig, as_json: bool, track: str | None) -> None:
    from petune.cli.track import tracked
    from petune.run import run as run_config

    config = config.model_copy(update={"output": config.output or _resumed(config)})
    with Progress() as progress, tracked(track, progress) as watch:
        result = run_config(config, watch=watch)
    if as_json:
        show_json(result.model_dump(mode="json"))
    else:
        show_result(result)


def _run_seeds(config: RunConfig, seeds: tuple[int, ...], as_json: bool, track: str | None) -> None:
    from petune.cli.compare import run_comparison
    from petune.compare import CompareConfig
    from petune.run import default_name

