"""Runs on a Ray cluster, placed by the CPUs and GPUs they need. A run whose worker dies resumes on another one."""

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
from petune.base.text import plural
from petune.runner.executors.executor import RUN, Failure, Wanted, WatchWork, Work, read_finished
from petune.runner.executors.worker import WorkerJob, read_answer
from petune.runner.run_config import RunConfig
from petune.training.events import Note
from petune.training.stop import StopFlag

POLL_S = 0.5
SAVE_TIMEOUT_S = 30.0


class RayOptions(Config):
    """Resources of each run, and the cluster.

    Attributes:
        cpus: Per run; also the threads of torch.
        gpus: Per run; 0.5 lets two runs share one. None takes one if the run's device uses it and a node has one.
        retries: How often a run is started again after its worker died.
        address: `ray://HOST:PORT`, `HOST:PORT`, `auto` or `local`. None takes RAY_ADDRESS, then a cluster on this
            machine, then starts one until petune ends.
    """

    cpus: int = Field(1, ge=1)
    gpus: float | None = Field(None, ge=0)
    retries: int = Field(3, ge=0)
    address: str | None = None


class RayExecutor:
    """See `Executor`. All nodes must share the run directories.

    Raises:
        MissingExtra: Ray is not installed.
    """

    def __init__(self, options: RayOptions) -> None:
        if find_spec("ray") is None:
            raise MissingExtra("the executor ray", "ray")
        self.options = options
        self._connection: ExitStack | None = None

    def __enter__(self) -> Self:
        """Keep the connection, once it is open, for further calls."""
        self._connection = ExitStack()
        return self

    def __exit__(self, *exc: object) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def __call__(
        self, configs: Sequence[RunConfig], wanted: Wanted, watch: WatchWork, work: Work = RUN
    ) -> Iterator[tuple[int, Any]]:
        """Submit all runs to the cluster and yield their results."""
        finished = read_finished(configs, work)
        yield from finished.items()
        waiting = {i: config for i, config in enumerate(configs) if i not in finished and wanted(config)}
        if not waiting:
            return
        with ExitStack() as one_call:
            if self._connect():  # before StopFlag, since Ray installs signal handlers
                (self._connection or one_call).callback(_ray().shutdown)
            with StopFlag() as stop:
                yield from self._results(waiting, stop, watch, work)

    def _connect(self) -> bool:
        """Connect to the cluster, or start one; return false if this process is connected already."""
        ray = _ray()
        if ray.is_initialized():
            return False
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            ray.init(self.options.address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            address = self.options.address or os.environ.get("RAY_ADDRESS") or "this machine"
            raise UsageError(f"no Ray cluster answers at {address}: {str(error).splitlines()[0]}") from None
        return True

    def _results(
        self, configs: Mapping[int, RunConfig], stop: StopFlag, watch: WatchWork, work: Work
    ) -> Iterator[tuple[int, Any]]:
        ray = _ray()
        indices = {self._submit(config, work): index for index, config in configs.items()}
        watch(Note(f"{plural(len(indices), 'run')} on a Ray cluster of {self._cluster_size()}"))
        while indices:
            if stop.signal_name is not None:
                self._cancel(list(indices))
                stop.check()
            done, _ = ray.wait(list(indices), timeout=POLL_S)
            for reference in done:
                index = indices.pop(reference)
                outcome = self._read_outcome(reference, configs[index], work)
                state = "failed" if isinstance(outcome, Failure) else "done"
                watch(Note(f"{configs[index].output}: {state}; {len(indices)} to go"))
                yield index, outcome

    def _submit(self, config: RunConfig, work: Work) -> Any:
        resources = self._resources(config)
        remote = _ray().remote(_do).options(**resources, max_retries=self.options.retries, retry_exceptions=[Stopped])
        return remote.remote(WorkerJob.create(config, self.options.cpus, work))

    def _read_outcome(self, reference: Any, config: RunConfig, work: Work) -> Config | Failure:
        ray = _ray()
        try:
            return read_answer(ray.get(reference), config, work)
        except ray.exceptions.RayTaskError:
            raise  # a bug, as it would be in a run here
        except ray.exceptions.RayError as error:
            first_line = str(error).strip().splitlines()[0]
            return Failure(type(error).__name__, f"{first_line} ({plural(self.options.retries, 'retry', 'retries')})")

    def _resources(self, config: RunConfig) -> dict[str, float]:
        """Return what a run requests of a node.

        Raises:
            UsageError: No node has that much, so the run would wait forever.
        """
        nodes = _nodes()
        cpus = self.options.cpus
        gpus = self.options.gpus
        if gpus is None:
            has_gpu = any(node.get("GPU", 0) >= 1 for node in nodes)
            gpus = 1 if config.device.startswith("cuda") or (config.device == "auto" and has_gpu) else 0
        if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
            raise UsageError(
                f"no node of {self._cluster_size()} has the {cpus} CPUs and {gpus:g} GPUs that a run requests. "
                "Request less: ray:cpus=…,gpus=…"
            )
        return {"num_cpus": cpus, "num_gpus": gpus}

    def _cluster_size(self) -> str:
        nodes = _nodes()
        cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
        return f"{len(nodes)} node{'s' * (len(nodes) > 1)}, {cpus:g} CPUs, {gpus:g} GPUs"

    def _cancel(self, references: list[Any]) -> None:
        """Interrupt the runs, as Ctrl-C would, and give them time to save."""
        ray = _ray()
        for reference in references:
            ray.cancel(reference)
        ray.wait(references, num_returns=len(references), timeout=SAVE_TIMEOUT_S)


def _do(job: WorkerJob) -> dict[str, Any]:
    return job()


def _nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in _ray().nodes() if node["Alive"]]


def _ray() -> Any:
    import ray

    return ray
