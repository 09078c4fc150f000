"""Tasks by name: listed from metadata, imported when one is asked for.

They register through the entry-point group `petune.tasks`, the built-in ones too. A plugin cannot take the name of a
task that comes with petune.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from petune.base.entry_points import PluginKind
from petune.base.errors import ConfigError
from petune.base.plugins import PluginRecord, list_plugins, load_plugin, plugin_errors
from petune.base.yaml_values import parse_options
from petune.data.target import Target, TargetKind

if TYPE_CHECKING:
    from petune.data.dataset import Dataset
    from petune.training.task import Task

TASKS = PluginKind(
    group="petune.tasks",
    noun="task",
    hint="petune.list_tasks() lists the installed ones; for a plugin's task install its package first, such as "
    "pip install petune-NAME",
)
AUTO_TASK = "auto"
"""The task of a run that names none: the built-in one of the dataset's kind of targets."""
BUILT_IN: Mapping[TargetKind, str] = {
    "class": "classification",
    "multi_hot": "multi_label",
    "number": "regression",
    "mask": "segmentation",
}


def list_tasks() -> list[PluginRecord]:
    """List every registered task, petune's own first, without importing any."""
    return list_plugins(TASKS)


def load_task(name: str) -> type[Task[Any]]:
    """Import the task class that is registered as `name`.

    Raises:
        UnknownName: No task has that name.
        PluginError: Two packages claim the name, or the package cannot be loaded; it and the cause are named.
    """
    from petune.training.task import Task, TaskConfig

    return load_plugin(TASKS, name, Task, TaskConfig)


def build_task(text: str) -> Task[Any]:
    """Build a task from its name, with options if needed: `classification`, `count:power=2`.

    Raises:
        UnknownName, PluginError: See `load_task`.
        ConfigError: An option is unknown or wrong.
    """
    name, _, options = text.partition(":")
    cls = load_task(name)
    config = cls.Config.build(parse_options(options), f"the options of {name}")
    with plugin_errors(TASKS, name, cls, "was made"):
        task = cls(config)
    task.name = name
    return task


def check_task(text: str, choose: str | None = None) -> None:
    """Check the name and the options of a task, before a dataset is read; `auto` is not known yet.

    Args:
        text: As for `build_task`, or `auto`.
        choose: The metric that chooses the epoch; None takes the task's first one.

    Raises:
        UnknownName, PluginError, ConfigError: See `build_task` and `choose_metrics`.
    """
    from petune.training.task import choose_metrics

    if text != AUTO_TASK:
        choose_metrics(build_task(text), choose)


def task_for(text: str, target: Target, dataset: str) -> Task[Any]:
    """Return the task of a run, bound to the targets of its dataset; it is not fitted yet.

    Args:
        text: As for `build_task`, or `auto`.
        target: Kind and names of the targets.
        dataset: The dataset's name, for messages.

    Raises:
        UnknownName, PluginError: See `load_task`.
        ConfigError: An option is unknown or wrong, or the task is for other targets.
    """
    built_in = BUILT_IN[target.kind]
    task = build_task(built_in if text == AUTO_TASK else text)
    if task.target_kind != target.kind:
        raise ConfigError(
            f"the task {task.name} is for targets of kind {task.target_kind!r}, but those of {dataset} are of kind "
            f"{target.kind!r}. Use another dataset, or another task, such as {built_in}",
            cli_hint=f"Write --task {built_in}",
        )
    with plugin_errors(TASKS, task.name, type(task), "was bound to a dataset"):
        task.bind(target, {})
        task.num_outputs()
    return task


def fitted_task(text: str, dataset: Dataset) -> Task[Any]:
    """Return the task of a run, fitted to the training split of its dataset.

    Raises:
        UnknownName, PluginError, ConfigError: See `task_for`.
    """
    task = task_for(text, dataset.target, dataset.name)
    with plugin_errors(TASKS, task.name, type(task), "was fitted"):
        task.bind(dataset.target, task.fit(dataset.train, dataset.target))
    return task


def describe_task(task: Task[Any]) -> dict[str, Any]:
    """Return everything that `restore_task` needs, as JSON data."""
    return {
        "name": task.name,
        "options": task.config.plain(),
        "state": task.state,
        "target": asdict(task.target) | {"names": list(task.target.names)},
    }


def restore_task(metadata: Mapping[str, Any]) -> Task[Any]:
    """Return the task of an adapter, as it was trained; adapters that record none are of classification.

    Args:
        metadata: Of the adapter.

    Raises:
        UnknownName, PluginError: The task's package is not installed, or cannot be loaded.
        ConfigError: It has other options now.
    """
    record = metadata.get("task") or {
        "name": "classification",
        "options": {},
        "state": {},
        "target": {"kind": "class", "names": metadata["classes"]},
    }
    cls = load_task(record["name"])
    config = cls.Config.build(record["options"], f"the options of {record['name']}")
    with plugin_errors(TASKS, record["name"], cls, "was made"):
        task = cls(config)
    task.name = record["name"]
    target = Target(**{**record["target"], "names": tuple(map(str, record["target"]["names"]))})
    with plugin_errors(TASKS, task.name, cls, "was restored"):
        task.bind(target, record["state"])
    return task
