"""Runs on a Ray cluster: placed by what they need; one whose worker dies goes on elsewhere from its checkpoint."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any, Self

from pydantic import Field

from petune.base.config import Config
from petune.base.errors import MissingExtra, Stopped, UsageError
from petune.runner.executors.trial import RUN, Failure, Trial, Wanted, Watch, Work, outcome_of
from petune.runner.run_config import RunConfig
from petune.training import Note, StopFlag

POLL_S = 0.5
TIME_TO_SAVE_S = 30.0


class RayOptions(Config):
    """What a run needs of the cluster, and which one.

    Attributes:
        cpus: Of each run, and threads of torch.
        gpus: Of each run, 0.5 lets two share one; None takes one where the run's device wants it and a node has one.
        retries: How often a run is started again whose worker died.
        address: `ray://HOST:PORT`, `HOST:PORT`, `auto` or `local`; None takes RAY_ADDRESS, then a cluster that runs
            on this machine, then starts one for as long as petune runs.
    """

    cpus: int = Field(1, ge=1)
    gpus: float | None = Field(None, ge=0)
    retries: int = Field(3, ge=0)
    address: str | None = None


class RayExecutor:
    """See `Executor`. Run directories must lie where all nodes see them.

    Raises:
        MissingExtra: Ray is not installed.
    """

    def __init__(self, options: RayOptions) -> None:
        if find_spec("ray") is None:
            raise MissingExtra("--executor ray", "ray")
        self.options = options
        self._held: ExitStack | None = None

    def __enter__(self) -> Self:
        """From here on a connection, once opened, is kept for the next call."""
        self._held = ExitStack()
        return self

    def __exit__(self, *exc: object) -> None:
        """Close it."""
        if self._held is not None:
            self._held.close()
        self._held = None

    def __call__(
        self, configs: Sequence[RunConfig], wanted: Wanted, watch: Watch, work: Work = RUN
    ) -> Iterator[tuple[int, Any]]:
        """Hand all runs to the cluster and yield them as they finish."""
        waiting = []
        for index, config in enumerate(configs):
            found = work.finished(config)
            if found is not None:
                yield index, found
            elif wanted(config):
                waiting.append(index)
        if not waiting:
            return
        with ExitStack() as own:
            if self._connect():  # it takes the signals, so it comes first
                (self._held or own).callback(_ray().shutdown)
            with StopFlag() as stop:
                yield from self._results({i: configs[i] for i in waiting}, stop, watch, work)

    def _connect(self) -> bool:
        """Whether this opened the connection, and must close it."""
        ray = _ray()
        if ray.is_initialized():
            return False
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            ray.init(self.options.address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = self.options.address or os.environ.get("RAY_ADDRESS") or "this machine"
            raise UsageError(f"a Ray cluster must answer at {where}, but: {str(error).splitlines()[0]}") from None
        return True

    def _results(
        self, configs: Mapping[int, RunConfig], stop: StopFlag, watch: Watch, work: Work
    ) -> Iterator[tuple[int, Any]]:
        ray = _ray()
        refs = {self._submit(config, work): index for index, config in configs.items()}
        watch(Note(f"{len(refs)} runs on a Ray cluster of {self._size()}"))
        while refs:
            if stop.signal_name is not None:
                self._cancel(list(refs))
                stop.check()
            done, _ = ray.wait(list(refs), timeout=POLL_S)
            for ref in done:
                index = refs.pop(ref)
                try:
                    outcome: Any = outcome_of(ray.get(ref), configs[index], work)
                except ray.exceptions.RayTaskError:
                    raise  # a bug in a run is one here
                except ray.exceptions.RayError as error:
                    reason = str(error).strip().splitlines()[0]
                    outcome = Failure(f"{type(error).__name__}: {reason} ({self.options.retries} retries)")
                ended = "failed" if isinstance(outcome, Failure) else "done"
                watch(Note(f"{configs[index].output}: {ended}; {len(refs)} to go"))
                yield index, outcome

    def _submit(self, config: RunConfig, work: Work) -> Any:
        need = self._need(config)
        remote = _ray().remote(_do).options(**need, max_retries=self.options.retries, retry_exceptions=[Stopped])
        return remote.remote(Trial.of(config, self.options.cpus, work))

    def _need(self, config: RunConfig) -> dict[str, float]:
        """What a run asks of a node.

        Raises:
            UsageError: No node has that much, so it would wait for ever.
        """
        nodes = [node["Resources"] for node in _ray().nodes() if node["Alive"]]
        gpus = self.options.gpus
        if gpus is None:
            has_gpu = any(node.get("GPU", 0) >= 1 for node in nodes)
            gpus = 1 if config.device.startswith("cuda") or (config.device == "auto" and has_gpu) else 0
        need = {"num_cpus": self.options.cpus, "num_gpus": gpus}
        if not any(node.get("CPU", 0) >= self.options.cpus and node.get("GPU", 0) >= gpus for node in nodes):
            raise UsageError(
                f"a node must have the {self.options.cpus} CPUs and {gpus:g} GPUs that a run needs, but no one of "
                f"{self._size()} has; change --executor ray:cpus=…,gpus=…"
            )
        return need

    def _size(self) -> str:
        nodes = [node["Resources"] for node in _ray().nodes() if node["Alive"]]
        cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
        return f"{len(nodes)} node{'s' * (len(nodes) > 1)}, {cpus:g} CPUs, {gpus:g} GPUs"

    def _cancel(self, refs: list[Any]) -> None:
        """Ask the runs to stop, as Ctrl-C would, and give them time to save."""
        ray = _ray()
        for ref in refs:
            ray.cancel(ref)
        ray.wait(refs, num_returns=len(refs), timeout=TIME_TO_SAVE_S)


def _do(trial: Trial) -> dict[str, Any]:
    return trial()


def _ray() -> Any:
    import ray

    return ray
