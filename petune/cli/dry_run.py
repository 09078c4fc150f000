"""`--dry-run`: the complete configuration and what would train; nothing is trained or written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from petune.cli.structure import plan_of, structure_of
from petune.cli.terminal import print_data, print_facts, print_json, print_status

if TYPE_CHECKING:
    from petune.injector.tuner import Recipe
    from petune.runner.compare import CompareConfig
    from petune.runner.run_config import RunConfig
    from petune.runner.sweep.trials import SweepConfig


def show_dry_run(
    config: RunConfig | CompareConfig | SweepConfig,
    methods: Sequence[str],
    *,
    as_json: bool,
    recipe: Recipe | None = None,
) -> None:
    """Print `config` as YAML on stdout, ready for --config, and on stderr what each method would train.

    Args:
        config: The complete configuration.
        methods: All methods of it.
        as_json: Print both as one JSON object on stdout.
        recipe: What is taken instead of the methods' own.

    Raises:
        ConfigError: A pretraining would leave parameters as they are.
    """
    from petune.runner.pretrain import PretrainConfig, check_all_trains
    from petune.runner.run_config import RunConfig

    run = config if isinstance(config, RunConfig) else config.run
    structure, model = structure_of(run)
    plans = [plan_of(method, model, structure.sites, recipe) for method in methods]
    if isinstance(config, PretrainConfig):
        check_all_trains(plans[0].total - plans[0].tuned - plans[0].head, config.method)
    if as_json:
        plain = config.model_dump(mode="json")
        print_json({"config": plain, "backbone": structure.full_name, "methods": [asdict(plan) for plan in plans]})
        return
    print_data(config.to_yaml().rstrip())
    print_status(f"\n{structure.full_name}; nothing was trained or written")
    for plan in plans:
        print_status("")
        print_facts(plan.facts(structure.forward_flops), to_stderr=True)
