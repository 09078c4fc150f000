"""`serial`, `ray:cpus=2,gpus=0.5`, `ray://head:10001`, `slurm:partition=gpu` → an executor; and all runs on it."""

from __future__ import annotations

from collections.abc import Sequence

from petune.base.distributed import num_processes
from petune.base.errors import UnknownName, UsageError
from petune.injector.registry import parse_method
from petune.runner.executors.trial import Executor, Outcome, Wanted, Watch, serial
from petune.runner.run_config import RunConfig

EXECUTORS = ("serial", "ray", "slurm")


def run_all(
    configs: Sequence[RunConfig],
    executor: str | Executor = "serial",
    *,
    wanted: Wanted = lambda config: True,
    watch: Watch = lambda event: None,
) -> list[Outcome | None]:
    """Do all `configs` and return what became of each, in their order; None for what was no longer wanted.

    A run that is finished is not done again; one that was interrupted goes on from its checkpoint.

    Args:
        configs: Each with an `output` of its own, and `resume`.
        executor: An executor, or its name with options in place; see `choose_executor`.
        wanted: Asked before a run begins: whether it is still worth it.
        watch: Told what happens.

    Raises:
        UsageError: A run has no directory of its own; see also `Executor`.
        MissingExtra: The executor's package is not installed.
        Stopped: A signal came; started again it goes on.
    """
    places = [config.output for config in configs]
    if None in places or len(set(places)) < len(places) or not all(config.resume for config in configs):
        raise UsageError("each of many runs needs an output of its own, and resume=True")
    chosen = choose_executor(executor)
    outcomes: list[Outcome | None] = [None] * len(configs)
    for index, outcome in chosen(configs, wanted, watch):
        outcomes[index] = outcome
    return outcomes


def choose_executor(executor: str | Executor) -> Executor:
    """The executor of that name, options in place; one that is an executor already is returned.

    Raises:
        UnknownName: There is none of that name.
        MissingExtra: Its package is not installed.
        ConfigError: An option is wrong.
        UsageError: It is neither text nor a function, or a launcher started several processes, which do one run at a
            time.
    """
    if not isinstance(executor, str):
        if not callable(executor):
            raise UsageError(f"executor must be {', '.join(EXECUTORS)} or a function as those, not {executor!r}")
        return executor
    name, options = parse_method(executor)
    if name == "serial":
        if options:
            raise UsageError(f"the executor serial takes no options, but came {executor}")
        return serial
    if num_processes() > 1:
        raise UsageError(f"several processes that do each run together take --executor serial, not {executor}")
    if name == "ray" or name.startswith("ray://"):
        from petune.runner.executors.ray import RayExecutor, RayOptions

        address = {"address": name} if name.startswith("ray://") else {}
        return RayExecutor(RayOptions.build({**address, **options}, "--executor"))
    if name == "slurm":
        from petune.runner.executors.slurm import SlurmExecutor, SlurmOptions

        return SlurmExecutor(SlurmOptions.build(options, "--executor"))
    raise UnknownName("executor", name, EXECUTORS, "Options are written in place: ray:cpus=2,gpus=0.5")
