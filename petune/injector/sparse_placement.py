"""Train entries of the backbone's parameters, and keep entries of added ones at zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from petune.base.errors import AttachError
from petune.injector.placement import Placer, free_name
from petune.injector.sparse import SparseParameters
from petune.injector.trainable import added_to, host_for
from petune.injector.zero_entries import ZeroEntries
from petune.sites.unsuitable import is_quantized


class SparsePlacer:
    """Registers what trains in part. Everything is recorded in the log and undone with it."""

    def __init__(self, placer: Placer) -> None:
        self.model = placer.model
        self.sites = placer.sites
        self.log = placer.log
        self.state = placer.state

    def train_entries(self, parameters: Sequence[nn.Parameter], masks: Sequence[Tensor]) -> SparseParameters:
        """Let some entries of the backbone's parameters train; see `Edit.train`.

        Raises:
            AttachError: A mask does not fit, or another method trains a parameter.
        """
        owners = self._owners(parameters)
        self.refuse_trained(parameters, whole=False)
        entries = SparseParameters([(module, name) for _, module, name in owners], masks)
        host = host_for(self.model.get_submodule(_common([path for path, _, _ in owners])))
        attribute = free_name(host, f"petune_{self.log.label}_entries")
        host.add_module(attribute, entries)
        self.log.undo_steps += [lambda: delattr(host, attribute), entries.undo, _without_gradients(parameters)]
        self.log.sparse.append(entries)
        self.log.added_parameters.append(entries.values)
        self.log.added_buffers.append((entries, "indices"))
        self.log.changes_all_rows = True
        self.log.toggles.append(entries.set_enabled)
        self.log.merges.append(entries.merge)
        entries.watch(self.model)
        inner = (block.enter for block in self.sites.all_blocks)
        for module in dict.fromkeys((self.model, *inner)):
            handle = module.register_forward_pre_hook(entries.before_forward, prepend=True)
            self.log.undo_steps.append(handle.remove)
        return entries

    def keep_zero(self, masks: Mapping[nn.Parameter, Tensor]) -> None:
        """Keep the entries of added parameters at zero where their mask is False."""
        for parameter, mask in masks.items():
            zeros = ZeroEntries(parameter, mask)
            self.log.zeros.append(zeros)
            self.log.undo_steps.append(zeros.remove)
            self.log.undo_steps.append(self.model.register_forward_pre_hook(zeros.before_forward, prepend=True).remove)

    def refuse_trained(self, parameters: Sequence[nn.Parameter], *, whole: bool = True) -> None:
        """Check that no other method trains entries of these parameters, nor the parameters if only entries are to.

        Raises:
            AttachError: One does, and both may be enabled at once.
        """
        state = self.state
        if state.is_bank_loading:
            return
        others = {name: parts for name, parts in state.attachments.items() if name != self.log.label}
        own = {id(p) for entries in self.log.sparse for p in entries.targets}
        own |= set() if whole else {id(p) for p in self.log.unfrozen}
        for p in parameters:
            trained = (name for name, parts in others.items() if not whole and any(p is q for q in parts.parameters))
            name = self.log.label if id(p) in own else state.values.sparse_trainer_of(p) or next(trained, None)
            if name == self.log.label:
                raise AttachError(
                    f"{name} trains entries of {self._path_of(p)} twice, or entries and all of it. Train it once, "
                    "with one mask"
                )
            if name is not None:
                raise AttachError(
                    f"{self.log.label} and {name} would both train {self._path_of(p)}, one of them single entries of "
                    "it, and each would restore its own values of it when it is disabled. Detach the other one first, "
                    "or attach one of them to a copy of the model, or load both into an AdapterBank"
                )

    def refuse_fixed(self, parameters: Sequence[nn.Parameter]) -> None:
        """Refuse parameters of which entries were to train, and that the model's author has fixed.

        Raises:
            AttachError: Always.
        """
        raise AttachError(
            f"{self.log.label} would train entries of {self._path_of(parameters[0])} and no other parameter, but its "
            "author fixed it (requires_grad=False among others that train). Call requires_grad_(True) on it before "
            "attaching, or use another method"
        )

    def _path_of(self, p: Tensor) -> str:
        return next(path for path, q in self.model.named_parameters() if q is p)

    def _owners(self, parameters: Sequence[nn.Parameter]) -> list[tuple[str, nn.Module, str]]:
        """Return path, module and name of each parameter of the model.

        Raises:
            AttachError: It is none, is given twice, or is quantized.
        """
        found: dict[int, tuple[str, nn.Module, str]] = {}
        for path, module in self.model.named_modules():
            for name, p in module._parameters.items():
                found.setdefault(id(p), (path, module, name))
        added = added_to(self.model)
        for number, p in enumerate(parameters):
            is_new = isinstance(p, Tensor) and (id(p) in added or any(p is q for q in parameters[:number]))
            if not isinstance(p, nn.Parameter) or id(p) not in found or is_new or not p.is_floating_point():
                raise AttachError(
                    f"edit.train with a mask takes floating-point parameters of the backbone, each once; number "
                    f"{number} is a {type(p).__name__} that is none, or was given before. Take them from edit.model"
                )
            if is_quantized(p):
                raise AttachError(
                    f"{self.log.label} trains single entries of {self._path_of(p)}, which is quantized "
                    f"({type(p).__name__}). Use base_precision=auto, or another method, such as lora or adaptformer"
                )
        if not parameters:
            raise AttachError("edit.train with a mask was given no parameter. Take them from edit.model")
        return [found[id(p)] for p in parameters]


def _without_gradients(parameters: Sequence[nn.Parameter]) -> Callable[[], None]:
    """Take gradients from before off the parameters: no optimizer clears them. Return what puts them back."""
    before = [(p, p.grad) for p in parameters if p.grad is not None]
    for p, _ in before:
        p.grad = None

    def restore() -> None:
        for p, gradient in before:
            p.grad = gradient

    return restore


def _common(paths: Sequence[str]) -> str:
    """Return the path of the innermost module that holds all of these modules."""
    parts = [path.split(".") for path in paths]
    same = [names[0] for names in zip(*parts, strict=False) if len({*names}) == 1]
    depth = next((i for i, names in enumerate(zip(*parts, strict=False)) if len({*names}) > 1), len(same))
    return ".".join(same[:depth])
