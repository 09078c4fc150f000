"""`petune pretrain`: a backbone from scratch."""

from __future__ import annotations

import json as json_format
import shlex
from typing import TYPE_CHECKING

from petune.base.distributed import init_group
from petune.cli.options import DryRun, Json, Settings, Track, configured
from petune.cli.run import show_result
from petune.cli.running import check_tracker, place_of, resumable, watching
from petune.cli.terminal import print_json, print_status

if TYPE_CHECKING:
    from petune.runner.pretrain import PretrainConfig

DEFAULTS = {
    "backbone": "vit_nano",
    "weights": "none",
    "dataset": "cifar100",
    "epochs": "30",
    "label-smoothing": "0.1",
    "val-fraction": "0.02",
    "lr": "2e-3",
    "weight-decay": "0.05",
    "optimizer": "nmuon",
}


@configured(without=("method",), defaults=DEFAULTS)
def pretrain(settings: Settings, *, json: Json = False, dry_run: DryRun = False, track: Track = None) -> None:
    """Train a backbone from scratch, for --weights.

    Everything trains, and the last epoch is kept.
    """
    from petune.runner.pretrain import RECIPE, PretrainConfig, pretrain as run_config, pretrain_name

    config = PretrainConfig.build(settings.values(), settings.source)
    check_tracker(track)
    if dry_run:
        from petune.cli.dry_run import show_dry_run

        show_dry_run(config, (config.method,), as_json=json, recipe=RECIPE)
        return
    place = init_group().broadcast(lambda: place_of(config, pretrain_name(config), resume="resume" in settings.flags))
    config = config.model_copy(update={"output": place})
    with resumable("pretrain", place), watching(track, place) as watch:
        result = run_config(config, watch=watch)
    if json:
        print_json(result.model_dump(mode="json"))
    else:
        show_result(result)
    print_status(f"use it with: {shlex.join(_words(config, result.output))}")


def _words(config: PretrainConfig, output: str) -> list[str]:
    """What `petune run` must be told for the same backbone with these weights."""
    words = ["--backbone", config.backbone, "--weights", output]
    for flag, side in (("--image-size", config.image_size), ("--patch-size", config.patch_size)):
        words += [] if side is None else [flag, str(side)]
    for key, value in config.backbone_options.items():
        words += ["--set", f"backbone_options.{key}={json_format.dumps(value)}"]
    return words if config.method == "full" else [*words, "--method", config.method]
