"""Executors by name (`serial`, `local:jobs=2`, `ray:cpus=2,gpus=0.5`, `slurm:partition=gpu`), and many runs."""

from __future__ import annotations

from collections.abc import Sequence

from petune.base.arguments import check_watch
from petune.base.config import shown
from petune.base.distributed import num_processes
from petune.base.errors import UnknownName, UsageError
from petune.injector.registry import parse_method
from petune.runner.executors.executor import Executor, Outcome, Wanted, WatchWork, serial
from petune.runner.run_config import RunConfig

EXECUTORS = ("serial", "local", "ray", "slurm")


def run_all(
    configs: Sequence[RunConfig],
    executor: str | Executor = "serial",
    *,
    wanted: Wanted = lambda config: True,
    watch: WatchWork = lambda event: None,
) -> list[Outcome | None]:
    """Do many runs and return their results in order; None for a run that was not wanted.

    A finished run is not repeated; an interrupted one resumes from its checkpoint.

    Args:
        configs: Each with its own `output`, and `resume=True`.
        executor: An executor, or its name with options; see `choose_executor`.
        wanted: Called before a run starts; false skips the run.
        watch: Called with every event.

    Raises:
        UsageError: Two runs share a directory; see also `Executor`.
        MissingExtra: The executor's package is not installed.
        Stopped: A signal arrived; call again to resume.
    """
    check_watch("petune.run_all", watch)
    if not isinstance(configs, Sequence) or not all(isinstance(config, RunConfig) for config in configs):
        raise UsageError("petune.run_all: configs must be a list of RunConfig")
    outputs = [config.output for config in configs]
    if None in outputs or len(set(outputs)) < len(outputs) or not all(config.resume for config in configs):
        raise UsageError("several runs need an output each, and resume=True")
    chosen = choose_executor(executor)
    outcomes: list[Outcome | None] = [None] * len(configs)
    for index, outcome in chosen(configs, wanted, watch):
        outcomes[index] = outcome
    return outcomes


def choose_executor(executor: str | Executor) -> Executor:
    """Return the executor with that name and options; an executor is returned as it is.

    Raises:
        UnknownName: No executor has that name.
        MissingExtra: Its package is not installed.
        ConfigError: An option is wrong.
        UsageError: It is neither text nor a function; or a launcher started several processes, which do each run
            together.
    """
    if not isinstance(executor, str):
        if not callable(executor):
            raise UsageError(f"executor must be {', '.join(EXECUTORS)} or a function like them, not {shown(executor)}")
        return executor
    name, options = parse_method(executor)
    if name == "serial":
        if options:
            raise UsageError(f"the executor serial has no options: {executor}")
        return serial
    if num_processes() > 1:
        raise UsageError(f"the executor {executor} cannot be used with torchrun or accelerate launch. Use serial")
    if name == "local":
        from petune.runner.executors.local import LocalExecutor, LocalOptions

        return LocalExecutor(LocalOptions.build(options, f"the executor {executor}"))
    if name == "ray" or name.startswith("ray://"):
        from petune.runner.executors.ray import RayExecutor, RayOptions

        address = {"address": name} if name.startswith("ray://") else {}
        return RayExecutor(RayOptions.build({**address, **options}, f"the executor {executor}"))
    if name == "slurm":
        from petune.runner.executors.slurm import SlurmExecutor, SlurmOptions

        return SlurmExecutor(SlurmOptions.build(options, f"the executor {executor}"))
    raise UnknownName("executor", name, EXECUTORS, "Options follow a colon: ray:cpus=2,gpus=0.5")
