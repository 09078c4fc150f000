"""`--dry-run`: print the complete configuration and what each method would train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from petune.base.errors import MAX_LISTED
from petune.base.text import format_percent, plural
from petune.cli.terminal import clean, format_count, format_flops, print_data, print_facts, print_json, print_status

if TYPE_CHECKING:
    from petune.injector.tuner import Recipe
    from petune.runner.compare_config import CompareConfig
    from petune.runner.preview import BackbonePreview, MethodPreview
    from petune.runner.run_config import RunConfig
    from petune.runner.sweep.sweep_config import SweepConfig


def print_dry_run(
    config: RunConfig | CompareConfig | SweepConfig,
    methods: Sequence[str],
    *,
    as_json: bool,
    recipe: Recipe | None = None,
    runs: Sequence[RunConfig] = (),
) -> None:
    """Print `config` as YAML on stdout, ready for --config, and what each method would train on stderr.

    Args:
        config: The complete configuration.
        methods: All its methods.
        as_json: Print both as one JSON object on stdout instead.
        recipe: The recipe used in place of the methods' own.
        runs: The runs that the command does, if it does several.

    Raises:
        PetuneError: Training would be refused before its first step. Images are not read.
    """
    from petune.backbones.create import check_weights_file
    from petune.backbones.quantize import check_base_precision
    from petune.data.lookup import count_classes
    from petune.injector.registry import build_tuner
    from petune.runner.continued import describe_start
    from petune.runner.pretrain import PretrainConfig
    from petune.runner.preview import preview_backbone, preview_data, preview_method
    from petune.runner.recipes import choose_recipe
    from petune.runner.run import check_all_trains, check_task_of_dataset
    from petune.runner.run_adapter import read_run_adapter
    from petune.runner.run_config import RunConfig
    from petune.runner.run_data import check_clips
    from petune.training.precision import choose_device

    run = config if isinstance(config, RunConfig) else config.run
    count_classes(run.dataset)
    run.check_final_fit()
    check_task_of_dataset(run)
    check_base_precision(run.base_precision)
    offline = _check_weights(run)
    choose_device(run.device)
    check_clips(run)
    backbone = preview_backbone(run)
    check_weights_file(run.backbone, run.weights, backbone.model, backbone.sites.parts.get("head"))
    recipes = [recipe or choose_recipe(build_tuner(method), run.recipe) for method in methods]
    previews = [preview_method(method, backbone, chosen) for method, chosen in zip(methods, recipes, strict=True)]
    if isinstance(config, PretrainConfig):
        counts = previews[0].counts
        check_all_trains(counts.total - counts.trainable, config.method)
    if as_json:
        data = [preview_data(preview) for preview in previews]
        _print_warnings(offline, backbone.warning)
        planned = {"runs": [str(run.output) for run in runs]} if runs else {}
        about = {"config": config.model_dump(mode="json"), "backbone": backbone.full_name, "methods": data}
        print_json({**about, **planned})
        return
    print_data(config.to_yaml().rstrip())
    print_status(f"\n{backbone.full_name}; dry run: nothing was trained or written")
    _print_warnings(offline, backbone.warning)
    if isinstance(config, RunConfig) and config.from_run is not None:
        print_status(f"continues from {describe_start(read_run_adapter(config.from_run))}")
    if runs:
        print_status(_describe_runs(runs))
    for preview in previews:
        print_status("")
        print_facts(method_facts(preview, backbone), to_stderr=True)


def _check_weights(run: RunConfig) -> str:
    """Check that the backbone's weights are available; return why not where only their server cannot be reached.

    That may be different where the training runs, so it is no error of a dry run.
    """
    from petune.backbones.create import check_weights
    from petune.base.errors import WeightsUnavailable

    try:
        check_weights(run.backbone, run.weights)
    except WeightsUnavailable as error:
        if not error.is_offline:
            raise
        return str(error)
    return ""


def _describe_runs(runs: Sequence[RunConfig]) -> str:
    """Return `10 runs: fold-1-seed0, … in runs/pets`."""
    names = [clean(run.output.name) for run in runs if run.output is not None]
    shown = ", ".join(names if len(names) <= MAX_LISTED else [*names[: MAX_LISTED - 1], "…", names[-1]])
    return f"{plural(len(names), 'run')} in {clean(str(runs[0].output and runs[0].output.parent))}: {shown}"


def _print_warnings(*warnings: str) -> None:
    for warning in filter(None, warnings):
        print_status(clean(f"warning: {warning}"))


def method_facts(preview: MethodPreview, backbone: BackbonePreview) -> list[tuple[str, str]]:
    """Return what a method would train, as names and values.

    Args:
        preview: The method on a backbone.
        backbone: The backbone.
    """
    from petune.runner.preview import describe_recipe

    counts = preview.counts
    added = format_percent(100 * (preview.forward_flops / backbone.forward_flops - 1))
    shares = (
        f"{format_percent(counts.percent_of_total, 3)} of all parameters, "
        f"{format_percent(counts.percent_of_backbone, 3)} of backbone and head"
    )
    return [
        ("method", preview.method),
        *((("blocks", ", ".join(map(str, preview.blocks))),) if preview.blocks is not None else ()),
        ("tuned", f"{format_count(counts.tuned)}  (with the head {shares})"),
        ("head", format_count(counts.head)),
        ("all parameters", format_count(counts.total)),
        ("forward", f"{format_flops(preview.forward_flops)} per {backbone.sample}"),
        ("without the method", f"{format_flops(backbone.forward_flops)} (the method adds {added})"),
        ("recipe", describe_recipe(preview.recipe)),
        *(("warning", text) for text in preview.warnings),
    ]
