"""Many tasks on one backbone: an adapter and a classifier each, switched by name, or mixed in one batch.

Shapes: B batch, D width of what enters the classifier, C classes of a task.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from petune.adapters.format import read_adapter
from petune.base.arguments import PathText, check_arguments
from petune.base.config import expand_home
from petune.base.errors import AttachError, UsageError
from petune.injector.attachment import Attachment
from petune.injector.hooks.base import After, Before, Holder, Parallel, Prompts
from petune.injector.load import attach_saved
from petune.injector.trainable import trainable_state_of
from petune.sites.find import find_sites
from petune.sites.logits import logits_of, synthetic_logits
from petune.sites.site import Site


@dataclass(frozen=True)
class Task:
    """One task: its adapter, and its classifier."""

    attachment: Attachment
    head: nn.Module


class AdapterBank:
    """AdapterBank by name on one model, in eval mode.

    Attributes:
        model: The backbone with its own classifier.
        tasks: What was loaded.
        active: The task that `model(x)` does now; None is the backbone's own.
    """

    def __init__(self, model: nn.Module) -> None:
        """Nothing is loaded yet.

        Raises:
            AttachError: The model has something attached already, or its classifier is not one module.
        """
        check_arguments("petune.AdapterBank", model=(model, nn.Module))
        if trainable_state_of(model) is not None:
            raise AttachError("tasks need a plain backbone, but something is attached to it; detach that first")
        self.model, self.tasks = model.eval(), dict[str, Task]()
        self._apart: set[str] = set()  # tasks that cannot share a forward on this model
        self._by_row: dict[Any, bool] = {}  # whether edits at such places have a row for each image
        self.active: str | None = None
        self.sites = find_sites(model)
        head = self.sites.head
        if not head.is_module:
            raise AttachError(f"tasks exchange the classifier, but {self.sites.model} has several: {head.where}")
        self._head: Site = head
        self._classifies_last = self._is_last()

    def load(self, name: str, path: str | Path) -> Task:
        """Load an adapter directory as the task `name`; it may have any number of classes.

        Raises:
            UsageError: The name is taken.
            BackboneMismatch, CheckpointError, PluginError: See `petune.load`.
        """
        check_arguments("load", name=(name, str), path=(path, PathText))
        if name in self.tasks:
            raise UsageError(f"each task needs a name of its own, but {name!r} is loaded already")
        self.use(None)
        saved = read_adapter(expand_home(path))
        head = _fitting(self._head, saved.tensors)
        sites = replace(self.sites, parts={**self.sites.parts, "head": replace(self._head, enter=head, exit=head)})
        try:
            self._put(head)
            attachment = attach_saved(self.model, saved, name=name, sites=sites)
            attachment.disable()
            self.tasks[name] = Task(attachment, head)
            if not self._has_rows(self.tasks[name]):
                self._apart.add(name)
        finally:
            self._put(self._head.enter)
        self.model.eval()
        return self.tasks[name]

    def use(self, name: str | None) -> nn.Module:
        """Switch the model to a task, or to the backbone's own output.

        Raises:
            UsageError: No task of that name.
        """
        check_arguments("use", name=(name, str | None))
        if self.active is not None:
            self.tasks[self.active].attachment.disable()
        self._put(self._head.enter)
        self.active = None
        if name is not None:
            task = self._task(name)
            self._put(task.head)
            task.attachment.enable()
            self.active = name
        return self.model

    def remove(self, name: str) -> None:
        """Take a task off the model."""
        check_arguments("remove", name=(name, str))
        self.use(None)
        task = self._task(name)
        self._put(task.head)
        task.attachment.detach()
        self._put(self._head.enter)
        del self.tasks[name]
        self._apart.discard(name)

    def __call__(self, x: Tensor, names: Sequence[str | None]) -> list[Tensor]:
        """Every row for its own task, in as few forwards as there are kinds of edits.

        Args:
            x: (B, channels, height, width).
            names: The task of each row; None is the backbone's own.

        Returns:
            Logits of each row, (C,) for its task.
        """
        if len(names) != len(x):
            raise UsageError(f"every row needs a task, but there are {len(x)} rows and {len(names)} names")
        before = self.active
        self.use(None)
        out: list[Tensor] = [x] * len(names)
        try:
            for together in self._passes(names):
                rows = [row for row, name in enumerate(names) if name in together]
                logits = self._shared(x[rows], [names[row] for row in rows])
                for row, logit in zip(rows, logits, strict=True):
                    out[row] = logit
        finally:
            self.use(before)
        return out

    def _passes(self, names: Sequence[str | None]) -> list[set[str | None]]:
        """Which tasks can share a forward: those whose edits leave other rows alone."""
        kinds: dict[Any, set[str | None]] = {}
        for name in dict.fromkeys(names):
            alone = name in self._apart or not self._classifies_last
            kind = () if name is None else name if alone else _kind(self._task(name))
            kinds.setdefault(kind, set()).add(name)
        return list(kinds.values())

    def _shared(self, x: Tensor, names: Sequence[str | None]) -> list[Tensor]:
        """One forward, or, where a place has no row for each image (windows), one for every task, from then on."""
        try:
            return self._forward(x, names)
        except AttachError:
            self._apart |= {name for name in names if name is not None}
            if len(set(names)) == 1:
                raise
        return self(x, names)

    def _forward(self, x: Tensor, names: Sequence[str | None]) -> list[Tensor]:
        chosen = {name: [row for row, n in enumerate(names) if n == name] for name in dict.fromkeys(names)}
        if len(chosen) == 1:
            with self._using(next(iter(chosen))):
                return list(logits_of(self.model(x)))
        capture = _Capture()
        with ExitStack() as stack:
            stack.callback(self._put, self._head.enter)
            self._put(capture)
            tasks = [(self.tasks[name].attachment, rows) for name, rows in chosen.items() if name is not None]
            stack.enter_context(_rowwise(tasks, len(names)))
            self.model(x)
            out: list[Tensor] = [x] * len(names)
            for name, rows in chosen.items():  # while the tasks are on: off, their classifiers are untrained
                head = self._head.enter if name is None else _like(self.tasks[name].head, self._head.enter)
                for row, logit in zip(rows, head(capture.seen[rows]), strict=True):
                    out[row] = logit
        return out

    def _is_last(self) -> bool:
        """Whether what the classifier returns is what the model returns, with nothing done to it."""
        made: list[tuple[Any, Any]] = []

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            made.append((out, out.clone() if isinstance(out, Tensor) else out))

        handle = self._head.enter.register_forward_hook(leave)
        try:
            logits = synthetic_logits(self.model, self.sites)
        finally:
            handle.remove()
        if len(made) != 1 or not isinstance(made[0][0], Tensor):
            return False
        return made[0][0].data_ptr() == logits.data_ptr() and torch.equal(made[0][1], logits)

    def _has_rows(self, task: Task) -> bool:
        """Whether each place of a task has a row for each image: for two and for three, so that no width is that."""
        log = task.attachment.edit_log
        if not self._classifies_last or _kind(task) == id(task):
            return True  # it has a forward of its own anyway
        key = frozenset((type(h), *(id(m) for site in passed for m in site.modules)) for h, passed in log.placed)
        if key not in self._by_row or log.row_toggles:
            try:
                for count in (2, 3):
                    with _rowwise([(task.attachment, list(range(count)))], count):
                        synthetic_logits(self.model, self.sites, count)
                self._by_row[key] = True
            except AttachError:
                self._by_row[key] = False
        return self._by_row[key]

    @contextmanager
    def _using(self, name: str | None) -> Iterator[None]:
        self.use(name)
        try:
            yield
        finally:
            self.use(None)

    def _task(self, name: str) -> Task:
        if name not in self.tasks:
            raise UsageError(f"no task {name!r} is loaded; there are {', '.join(map(repr, self.tasks)) or 'none'}")
        return self.tasks[name]

    def _put(self, head: nn.Module) -> None:
        self.model.set_submodule(self._head.path, _like(head, self.model.get_submodule(self._head.path)))


def _like(head: nn.Module, other: nn.Module) -> nn.Module:
    """A classifier where the other one is, and in its type: only the one in place moves with the model."""
    mine, its = next(head.parameters(), None), next(other.parameters(), None)
    if mine is not None and its is not None and (mine.device, mine.dtype) != (its.device, its.dtype):
        head.to(its.device, its.dtype)
    return head


class _Capture(nn.Module):
    """Stands in for the classifier and keeps what enters it."""

    seen: Tensor

    def forward(self, x_BD: Tensor) -> Tensor:
        self.seen = x_BD
        return x_BD


class _Rows(nn.Module):
    """An adapter, or several, that work on some rows of a batch each; `replaces` says that theirs is the output."""

    def __init__(self, parts: list[tuple[nn.Module, Tensor]], batch_size: int, replaces: bool) -> None:
        super().__init__()
        self.parts, self.batch_size, self.replaces = parts, batch_size, replaces

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) to what the adapters make of it, (B, ...)."""
        if len(x) != self.batch_size:
            raise AttachError(
                f"one batch of several tasks needs a row for each image at every place, but there are {len(x)} for "
                f"{self.batch_size} images"
            )
        out: Tensor | None = x if self.replaces else None
        for adapter, rows in self.parts:
            made = adapter(x[rows])
            made = made.expand(len(rows), *made.shape[1:]) if len(made) == 1 else made
            out = made.new_zeros(len(x), *made.shape[1:]) if out is None else out
            out = out.index_copy(0, rows, made.to(out.dtype))
        assert out is not None
        return out


@contextmanager
def _rowwise(tasks: list[tuple[Attachment, list[int]]], batch_size: int) -> Iterator[None]:
    """Inside, every attachment works on its rows only; prompts at one place are put in by one holder for all."""
    with ExitStack() as stack:
        leaders: dict[tuple[int, int], tuple[Prompts, list[tuple[nn.Module, Tensor]]]] = {}
        for attachment, rows in tasks:
            attachment.enable()
            stack.callback(attachment.disable)
            for switch in attachment.edit_log.row_toggles:
                switch(rows, batch_size)
                stack.callback(switch, None, batch_size)
            index = torch.tensor(rows, device=next(attachment.model.parameters()).device)
            for holder, passed in attachment.edit_log.placed:
                if isinstance(holder, Prompts):
                    place = (id(passed[0].enter), id(passed[-1].exit))
                    leader = leaders.setdefault(place, (holder, []))
                    leader[1].append((holder.adapter, index))
                    holder.enabled = False  # until all are there: no two attachments have prompts at once
                else:
                    parts = [(holder.adapter, index)]
                    _stand_in(stack, holder, _Rows(parts, batch_size, isinstance(holder, After | Before)))
        for holder, parts in leaders.values():
            holder.enabled = True
            _stand_in(stack, holder, _Rows(parts, batch_size, replaces=False))
        yield


def _stand_in(stack: ExitStack, holder: Holder, rows: _Rows) -> None:
    stack.callback(setattr, holder, "adapter", holder.adapter)
    holder.adapter = rows


def _kind(task: Task) -> Any:
    """Equal for tasks that can share a forward; a value of its own for one that cannot."""
    log = task.attachment.edit_log
    prompts = [(h.num_prompts, p[0].path, p[-1].exit_path) for h, p in log.placed if isinstance(h, Prompts)]
    alone = (
        log.unfrozen  # the backbone's own values differ
        or not all(type(holder) in {Parallel, Before, After, Prompts} for holder, _ in log.placed)
        or (log.added_parameters and not log.row_toggles)
        or (log.toggles and (prompts or not log.added_parameters))  # the attention is told of the prompts
    )
    return id(task) if alone else tuple(prompts)


def _fitting(site: Site, tensors: dict[str, Tensor]) -> nn.Module:
    """A copy of the classifier with as many classes as the file's."""
    head = copy.deepcopy(site.enter)
    for path, module in list(head.named_modules()):
        if isinstance(module, nn.Linear):
            key = ".".join(filter(None, (site.path, path, "weight")))
            saved = next((t for k, t in tensors.items() if k == key or k.endswith(f".{key}")), None)
            if saved is not None and saved.shape[0] != module.out_features:
                weight, bias = module.weight, module.bias is not None
                new = nn.Linear(saved.shape[1], saved.shape[0], bias, device=weight.device, dtype=weight.dtype)
                head = new if not path else _with(head, path, new)
    return head


def _with(head: nn.Module, path: str, module: nn.Module) -> nn.Module:
    head.set_submodule(path, module)
    return head
