"""Many adapters on one backbone: selected by name, or mixed within one batch."""

from __future__ import annotations

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
from petune.base.text import plural
from petune.injector.attachment import Attachment
from petune.injector.load import attach_saved
from petune.injector.trainable import trainable_state_of
from petune.serving.bank_heads import CaptureInput, check_same_head, head_for, match_device
from petune.serving.mixed_batch import placement_key, row_wise, sharing_key
from petune.sites.find import find_sites
from petune.sites.input_spec import Inputs
from petune.sites.logits import logits_of, synthetic_logits
from petune.sites.site import Site


@dataclass(frozen=True)
class BankEntry:
    """One loaded adapter, and its classifier."""

    attachment: Attachment
    head: nn.Module


class AdapterBank:
    """Many adapters on one model, each with its own classifier.

    Attributes:
        model: The backbone, in eval mode, with its own classifier.
        adapters: The loaded adapters by name.
        active: Name of the adapter that `model(x)` uses; None is the backbone's own output.
    """

    def __init__(self, model: nn.Module, *, example: Any = None) -> None:
        """Create an empty bank.

        Args:
            model: A backbone with nothing attached.
            example: What its forward takes, if that is not one image; see `petune.find_sites`.

        Raises:
            AttachError: Something is attached to the model, or its classifier is not a single module.
        """
        check_arguments("petune.AdapterBank", model=(model, nn.Module))
        if trainable_state_of(model) is not None:
            raise AttachError("a tuner is attached to this model. Call its detach() first")
        self.model = model.eval()
        self.adapters: dict[str, BankEntry] = {}
        self.active: str | None = None
        self._sites = find_sites(model, example=example)
        self._head: Site = self._sites.head
        if not self._head.is_module:
            raise AttachError(
                f"a bank exchanges one classifier, and {self._sites.model} has several heads ({self._head.where}). "
                "Load one adapter at a time with petune.load, and detach it before the next"
            )
        self._head_is_last = self._returns_head_output()
        self._unshared: set[str] = set()  # names of adapters that need a forward of their own
        self._row_per_image: dict[frozenset[Any], bool] = {}  # by the placement of an adapter

    def load(self, name: str, path: str | Path) -> BankEntry:
        """Load an adapter directory under a name; its number of classes may differ from the others'.

        Raises:
            UsageError: The name is taken.
            BackboneMismatch: The adapter was trained on another backbone.
            CheckpointError: The directory is damaged, or there is no adapter in it.
            PluginError: The adapter's method is not installed.
        """
        check_arguments("load", name=(name, str), path=(path, PathText))
        if name in self.adapters:
            raise UsageError(f"an adapter named {name!r} is already loaded. Use another name, or remove it first")
        self.use(None)
        saved = read_adapter(expand_home(path))
        check_same_head(self._head, saved)
        head = head_for(self._head, saved.tensors)
        head_site = replace(self._head, enter=head, exit=head)
        sites = replace(self._sites, parts={**self._sites.parts, "head": head_site})
        try:
            self._set_head(head)
            attachment = attach_saved(self.model, saved, name=name, sites=sites)
            attachment.disable()
            self.adapters[name] = BankEntry(attachment, head)
            if not self._can_share(attachment):
                self._unshared.add(name)
        finally:
            self._set_head(self._head.enter)
        self.model.eval()
        return self.adapters[name]

    def use(self, name: str | None) -> nn.Module:
        """Make `model(x)` use an adapter, or None for the backbone's own output; return the model.

        Raises:
            UsageError: No adapter of that name is loaded.
        """
        check_arguments("use", name=(name, str | None))
        if self.active is not None:
            self.adapters[self.active].attachment.disable()
        self._set_head(self._head.enter)
        self.active = None
        if name is not None:
            entry = self._entry(name)
            self._set_head(entry.head)
            entry.attachment.enable()
            self.active = name
        return self.model

    def remove(self, name: str) -> None:
        """Detach an adapter from the model and forget it.

        Raises:
            UsageError: No adapter of that name is loaded.
        """
        check_arguments("remove", name=(name, str))
        self.use(None)
        entry = self._entry(name)
        self._set_head(entry.head)
        entry.attachment.detach()
        self._set_head(self._head.enter)
        del self.adapters[name]
        self._unshared.discard(name)

    def __call__(self, x: Any, names: Sequence[str | None]) -> list[Tensor]:
        """Compute every row with its own adapter. Rows whose adapters do not affect other rows share one forward.

        Args:
            x: (B, channels, height, width); or what the model takes, in the form of the example.
            names: Adapter of each row; None is the backbone's own output.

        Returns:
            Logits of each row, (C,); C depends on the adapter.

        Raises:
            UsageError: The number of names differs from the number of rows, or a name is not loaded.
        """
        inputs = self._sites.input_spec.inputs(x)
        num_rows = self._sites.input_spec.num_samples_in(inputs.tensors)
        if len(names) != num_rows:
            raise UsageError(
                f"x has {plural(num_rows, 'row')}, and there are {plural(len(names), 'name')}. Give one name per row"
            )
        return self._compute(inputs, names)

    def _compute(self, inputs: Inputs, names: Sequence[str | None]) -> list[Tensor]:
        """See `__call__`."""
        active = self.active
        self.use(None)
        logits: list[Tensor] = [*inputs.tensors[:1]] * len(names)
        try:
            for group in self._groups(names):
                rows = [row for row, name in enumerate(names) if name in group]
                outputs = self._forward_group(self._sites.input_spec.select(inputs, rows), [names[row] for row in rows])
                for row, output in zip(rows, outputs, strict=True):
                    logits[row] = output
        finally:
            self.use(active)
        return logits

    def _groups(self, names: Sequence[str | None]) -> list[set[str | None]]:
        """Group the adapters that can share a forward."""
        groups: dict[Any, set[str | None]] = {}
        for name in dict.fromkeys(names):
            if name is None:
                key: Any = ()  # as for adapters without prompts
            else:
                attachment = self._entry(name).attachment
                key = name if name in self._unshared else sharing_key(attachment)
            groups.setdefault(key, set()).add(name)
        return list(groups.values())

    def _forward_group(self, x: Inputs, names: Sequence[str | None]) -> list[Tensor]:
        """Run one forward. If a site has no row per image, run one forward per adapter, now and in later calls."""
        try:
            return self._forward_single(x, names[0]) if len(set(names)) == 1 else self._forward_mixed(x, names)
        except AttachError:
            self._unshared |= {name for name in names if name is not None}
            if len(set(names)) == 1:
                raise
        return self._compute(x, names)

    def _forward_single(self, x: Inputs, name: str | None) -> list[Tensor]:
        try:
            return list(logits_of(x.call(self.use(name))))
        finally:
            self.use(None)

    def _forward_mixed(self, x: Inputs, names: Sequence[str | None]) -> list[Tensor]:
        """Run the body of the model once, then each classifier on the rows of its adapter."""
        rows_of = {name: [row for row, other in enumerate(names) if other == name] for name in dict.fromkeys(names)}
        parts = [(self.adapters[name].attachment, rows) for name, rows in rows_of.items() if name is not None]
        logits: list[Tensor] = [*x.tensors[:1]] * len(names)
        with self._captured_head() as capture, row_wise(parts, len(names)):
            x.call(self.model)
            for name, rows in rows_of.items():  # while the adapters are enabled; disabling them resets their heads
                head = self._head.enter if name is None else match_device(self.adapters[name].head, self._head.enter)
                for row, output in zip(rows, head(capture.captured[rows]), strict=True):
                    logits[row] = output
        return logits

    @contextmanager
    def _captured_head(self) -> Iterator[CaptureInput]:
        capture = CaptureInput()
        with ExitStack() as stack:
            stack.callback(self._set_head, self._head.enter)
            self._set_head(capture)
            yield capture

    def _returns_head_output(self) -> bool:
        """Return True if the model returns exactly what its classifier returns."""
        outputs: list[tuple[Any, Any]] = []

        def record(module: nn.Module, args: Any, output: Any) -> None:
            outputs.append((output, output.clone() if isinstance(output, Tensor) else output))

        handle = self._head.enter.register_forward_hook(record)
        try:
            logits = synthetic_logits(self.model, self._sites)
        finally:
            handle.remove()
        if len(outputs) != 1 or not isinstance(outputs[0][0], Tensor):
            return False
        output, copy = outputs[0]
        return output.data_ptr() == logits.data_ptr() and torch.equal(copy, logits)

    def _can_share(self, attachment: Attachment) -> bool:
        """Return True if the adapter can share a forward with others, because its sites have a row per image.

        Inside Swin's attention they have a row per window. Two and three images are tried, so that no other size is
        mistaken for the batch.
        """
        if not self._head_is_last or sharing_key(attachment) is None:
            return False
        key = placement_key(attachment)
        if key not in self._row_per_image or attachment.edit_log.row_toggles:
            try:
                for count in (2, 3):
                    with row_wise([(attachment, list(range(count)))], count):
                        synthetic_logits(self.model, self._sites, count)
                self._row_per_image[key] = True
            except AttachError:
                self._row_per_image[key] = False
        return self._row_per_image[key]

    def _entry(self, name: str) -> BankEntry:
        if name not in self.adapters:
            loaded = ", ".join(map(repr, self.adapters)) or "none"
            raise UsageError(f"no adapter {name!r} is loaded. Loaded: {loaded}")
        return self.adapters[name]

    def _set_head(self, head: nn.Module) -> None:
        path = self._head.path
        self.model.set_submodule(path, match_device(head, self.model.get_submodule(path)))
