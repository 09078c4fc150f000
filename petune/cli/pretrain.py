"""`petune pretrain`: train a backbone from scratch."""

from __future__ import annotations

import json as json_format
import shlex
from typing import TYPE_CHECKING

from petune.base.distributed import init_group
from petune.cli.options import DryRun, Json, Tracker
from petune.cli.run import print_result
from petune.cli.running import check_directory, check_tracker, resume_hint, run_directory, watching
from petune.cli.settings import Settings, configured
from petune.cli.terminal import print_status

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


@configured(without=("method", "from", "recipe"), defaults=DEFAULTS)
def pretrain(settings: Settings, *, json: Json = False, dry_run: DryRun = False, tracker: Tracker = None) -> None:
    """Train a backbone from scratch, for --weights.

    All parameters are trained, and the last epoch is saved.
    """
    from petune.runner.file_names import CONFIG_FILE
    from petune.runner.pretrain import RECIPE, PretrainConfig, pretrain as run_config, pretrain_name

    config = PretrainConfig.build(settings.values(), settings.source)
    check_tracker(tracker)
    resume = "resume" in settings.flags
    if dry_run:
        from petune.cli.dry_run import print_dry_run

        check_directory(config, pretrain_name(config), command="pretrain", resume=resume)
        print_dry_run(config, (config.method,), as_json=json, recipe=RECIPE)
        return
    output = init_group().broadcast(lambda: run_directory(config, pretrain_name(config), resume=resume))
    config = config.model_copy(update={"output": output})
    with resume_hint("pretrain", output / CONFIG_FILE, "--resume", tracker=tracker), watching(tracker, output) as watch:
        result = run_config(config, watch=watch)
    print_result(result, as_json=json)
    print_status(f"use it with: {shlex.join(_run_flags(config, result.output))}")


def _run_flags(config: PretrainConfig, output: str) -> list[str]:
    """Return the flags by which `petune run` builds the same backbone with these weights."""
    words = ["--backbone", config.backbone, "--weights", output]
    for flag, size in (("--image-size", config.image_size), ("--patch-size", config.patch_size)):
        if size is not None:
            words += [flag, str(size)]
    for key, value in config.backbone_options.items():
        words += ["--set", f"backbone_options.{key}={json_format.dumps(value)}"]
    return words if config.method == "full" else [*words, "--method", config.method]
