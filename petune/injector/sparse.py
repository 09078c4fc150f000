"""Train some entries of parameters that the backbone already has; the others stay frozen.

The entries are a parameter of their own, a vector. Optimizer, weight decay, clipping, averages and files see nothing
else. The model computes with its own weights: before a forward, the vector's values are written into them, and after a
backward, the gradients of these entries become the vector's gradient.

Shapes: K trained entries, of all parameters together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from petune.base.errors import AttachError
from petune.base.text import plural
from petune.injector.keys import TensorOwner


class SparseParameters(nn.Module):
    """Entries of some of the backbone's parameters that train, as `Edit.train(..., mask=...)` returns them.

    Args:
        owners: Where the parameters are.
        masks: For each parameter a boolean tensor of its shape, True for the entries that train.

    Attributes:
        values: The entries that train, (K,), in the order of the parameters, each flattened.
        indices: Their positions among the entries of all parameters in a row; (K,).
    """

    is_petune_module = True
    indices: Tensor

    def __init__(self, owners: Sequence[TensorOwner], masks: Sequence[Tensor]) -> None:
        super().__init__()
        self.owners = tuple(owners)  # in a tuple: they stay the backbone's own modules
        self.enabled = True
        self.collecting = True
        self.merged = False
        indices = self._indices_of(masks)
        self.register_buffer("indices", indices)
        self._written = _Written(indices.clone(), self._read(indices))
        self.values = nn.Parameter(self._written.original.clone())
        self.mark_written()

    @property
    def targets(self) -> tuple[nn.Parameter, ...]:
        """The backbone's parameters, as they are in the model."""
        return tuple(module.get_parameter(name) for module, name in self.owners)

    def masks(self) -> list[Tensor]:
        """Return for each parameter a boolean tensor of its shape, True for the entries that train."""
        masks = []
        for p, _, local in self._parts(self.indices):
            mask = torch.zeros(p.numel(), dtype=torch.bool, device=p.device)
            mask[local.to(p.device)] = True
            masks.append(mask.view(p.shape))
        return masks

    @torch.no_grad()
    def choose(self, masks: Sequence[Tensor]) -> None:
        """Train other entries, of the same number; they start at the backbone's values. For `Tuner.calibrate`.

        Raises:
            AttachError: A mask has another shape or dtype, or the number of entries is another one.
        """
        indices = self._indices_of(masks)
        if len(indices) != len(self.indices):
            raise AttachError(
                f"the masks have {plural(len(indices), 'true entry', 'true entries')}, but {len(self.indices):,} were "
                "declared when the method was attached. Choose as many: optimizer and files are made for them"
            )
        self.indices.copy_(indices)
        self._rebase()
        self.values.copy_(self._written.original)
        self.mark_written()

    @torch.no_grad()
    def write(self) -> None:
        """Write the values into the model's weights, if they are others than those that are there."""
        if self.merged or not self.enabled or self.values.is_meta or self._state() == self._written.version:
            return
        may_differ = self._written.version is None or self._state()[2:] != self._written.version[2:]
        if may_differ and not torch.equal(self.indices, self._written.indices.to(self.indices.device)):
            self._rebase()
        for p, (part, local) in zip(self.targets, self._own_parts(), strict=True):
            _put(p, local, self.values[part])
        self.mark_written()

    @torch.no_grad()
    def set_enabled(self, on: bool) -> None:
        """Write the trained values into the weights, or the original ones."""
        if self.merged:
            self.merged = not on
            return
        if on == self.enabled:
            return
        if not on:
            self.write()
            self._put(self._written.indices, self._written.original)
        self.enabled, self._written.version = on, None
        self.write()

    def merge(self) -> None:
        """Leave the trained values in the weights for good."""
        self.write()
        self.merged = True

    @torch.no_grad()
    def original(self, tensor: Tensor) -> Tensor:
        """Return a tensor with the values from before, if it is one of the parameters."""
        if not self.enabled or self.merged:
            return tensor
        for p, part, local in self._parts(self._written.indices):
            if p is tensor:
                values = self._written.original[part].to(tensor.device, tensor.dtype)
                return tensor.detach().clone().put_(local.to(tensor.device), values)
        return tensor

    def before_forward(self, module: nn.Module, args: Any) -> None:
        """Write the values; pre-hook of the model and of its blocks."""
        if torch.compiler.is_exporting():
            return
        if not torch.compiler.is_compiling():
            self._prepare()
        elif module is self._root:
            _prepare_outside(self)

    def watch(self, root: nn.Module) -> None:
        """Remember which module is the whole model."""
        self.__dict__["_root_of"] = (root,)
        self._load_hooks = (
            root.register_load_state_dict_pre_hook(self._before_load),  # type: ignore[no-untyped-call]
            root.register_load_state_dict_post_hook(self._after_load),  # type: ignore[no-untyped-call]
        )

    @torch.no_grad()
    def _before_load(self, root: nn.Module, state: Mapping[str, Tensor], prefix: str, *rest: Any) -> None:
        """Note the backbone's values of entries that a state_dict chooses: it may hold the trained ones."""
        if self.merged or self.values.is_meta:
            return
        if self.enabled:
            self._put(self._written.indices, self._written.original)
        path = next((path for path, module in root.named_modules() if module is self), "")
        indices = state.get(f"{prefix}{path}.indices")
        self._written.brings_entries = indices is not None
        if indices is not None and indices.shape == self.indices.shape:
            indices = indices.detach().to(self.indices, copy=True)
            self._written.indices, self._written.original = indices, self._read(indices)
        self._written.version = None

    @torch.no_grad()
    def _after_load(self, root: nn.Module, keys: Any) -> None:
        """Let the next forward write the trained values; without entries, the state_dict was the backbone's own."""
        if self.merged or self.values.is_meta:
            return
        if not self._written.brings_entries:
            self._written.original = self._read(self._written.indices)
        elif not self.enabled:
            self._put(self._written.indices, self._written.original)

    @property
    def _root(self) -> nn.Module | None:
        found: tuple[nn.Module, ...] = self.__dict__.get("_root_of", ())
        return found[0] if found else None

    def undo(self) -> None:
        """Give the weights their original values, unless they were merged, and take the hooks off."""
        if not self.merged:
            self.set_enabled(False)
        self._remove_hooks()
        for handle in self._load_hooks:
            handle.remove()

    def _remove_hooks(self) -> None:
        for handle in self._written.handles.values():
            handle.remove()
        self._written.handles = {}

    def forward(self, x: Any) -> Any:
        """Return `x`: a model may call all of its children."""
        return x

    def mark_written(self) -> None:
        """Record that the weights hold the present values."""
        self._written.version = self._state()

    def _prepare(self) -> None:
        self.write()
        parameters = self.targets
        if self._written.handles.keys() != {id(p) for p in parameters} and not self.values.is_meta:
            self._remove_hooks()
            for index, p in enumerate(parameters):
                if p.requires_grad and p.is_leaf:
                    self._written.handles[id(p)] = p.register_post_accumulate_grad_hook(self._collector(index))  # type: ignore[no-untyped-call]

    def _collector(self, index: int) -> Callable[[Tensor], None]:
        def collect(p: Tensor) -> None:
            if not self.collecting:
                return
            gradient, p.grad = p.grad, None
            if gradient is None or not self.enabled or not self.values.requires_grad:
                return
            part, local = self._own_parts()[index]
            if self.values.grad is None:
                self.values.grad = torch.zeros_like(self.values)
            self.values.grad[part] += gradient.take(local.to(p.device)).to(self.values)

        return collect

    def _own_parts(self) -> list[tuple[slice, Tensor]]:
        """Return for each parameter which of the values are its own, and their positions in it."""
        state = id(self.indices), self.indices._version
        if self._written.parts is None or self._written.parts[0] != state:
            self._written.parts = state, [(part, local.to(p.device)) for p, part, local in self._parts(self.indices)]
        return self._written.parts[1]

    def _parts(self, indices: Tensor) -> Iterator[tuple[nn.Parameter, slice, Tensor]]:
        """Yield each parameter, which of the entries are its own, and their positions in it."""
        start, first = 0, 0
        for p in self.targets:
            last = int(torch.searchsorted(indices, start + p.numel()))
            yield p, slice(first, last), (indices[first:last] - start).long()
            start, first = start + p.numel(), last

    def _indices_of(self, masks: Sequence[Tensor]) -> Tensor:
        parameters = self.targets
        check_masks(parameters, masks)
        flat = torch.cat([mask.reshape(-1).to(parameters[0].device) for mask in masks])
        dtype = torch.int32 if len(flat) < 2**31 else torch.int64
        return flat.nonzero().flatten().to(dtype)

    @torch.no_grad()
    def _read(self, indices: Tensor) -> Tensor:
        parts = [p.take(local.to(p.device)) for p, _, local in self._parts(indices)]
        return torch.cat([part.to(parts[0]) for part in parts])

    def _put(self, indices: Tensor, values: Tensor) -> None:
        for p, part, local in self._parts(indices):
            _put(p, local.to(p.device), values[part])

    def _rebase(self) -> None:
        """Give the weights the backbone's values, and note those of the entries that train now."""
        self._put(self._written.indices, self._written.original)
        self._written.indices, self._written.original = self.indices.clone(), self._read(self.indices)

    def _state(self) -> Any:
        return id(self.values), self.values._version, id(self.indices), self.indices._version


def _put(p: Tensor, positions: Tensor, values: Tensor) -> None:
    if len(positions):
        p.put_(positions, values.to(p.device, p.dtype))


class _Written:
    """The values that the weights hold, also in a forward after which the attributes of modules are restored.

    Attributes:
        indices: The entries that may hold other values than the backbone's; (K,).
        original: The backbone's; (K,).
        version: The state of values and indices that the weights hold.
        parts: Which of the values belong to which parameter, and the state of the indices that this holds for.
        handles: Of the hooks that collect gradients, by the id of their parameter.
        brings_entries: The state_dict that is loaded has indices, and so may have trained values in the weights.
    """

    def __init__(self, indices: Tensor, original: Tensor) -> None:
        self.indices = indices
        self.original = original
        self.version: Any = None
        self.parts: tuple[Any, list[tuple[slice, Tensor]]] | None = None
        self.handles: dict[int, Any] = {}
        self.brings_entries = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "handles": {}, "version": None, "parts": None}  # hooks stay with the original tensors


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _prepare_outside(parameters: SparseParameters) -> None:
    """Write the values outside of the compiled code: the model computes with its weights as they are."""
    parameters._prepare()


@contextmanager
def full_gradients(sparse: Sequence[SparseParameters]) -> Iterator[None]:
    """Leave gradients at the parameters, of all their entries, inside the context."""
    for parameters in sparse:
        parameters.collecting = False
    try:
        yield
    finally:
        for parameters in sparse:
            parameters.collecting = True


def check_masks(parameters: Sequence[nn.Parameter], masks: Sequence[Tensor]) -> None:
    """Check that there is a boolean mask of the right shape for each parameter, and an entry that trains.

    Raises:
        AttachError: There is not.
    """
    if isinstance(masks, Tensor) or len(masks) != len(parameters):
        count = "one tensor" if isinstance(masks, Tensor) else plural(len(masks), "mask")
        raise AttachError(
            f"edit.train was given {count} for {plural(len(parameters), 'parameter')}. Pass a list with one boolean "
            "tensor for each parameter, in their order"
        )
    for number, (p, mask) in enumerate(zip(parameters, masks, strict=True)):
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != p.shape:
            is_tensor = isinstance(mask, Tensor)
            found = f"{mask.dtype} {tuple(mask.shape)}" if is_tensor else type(mask).__name__
            raise AttachError(
                f"mask {number} of edit.train is {found}, but its parameter has shape {tuple(p.shape)}. A mask is a "
                "boolean tensor of the parameter's shape, True for the entries that train"
            )
    if any(t.is_meta for t in (*parameters, *masks)):
        raise AttachError(
            "edit.train cannot read a mask on the meta device, which has no values. Build the model on a real device"
        )
    if not any(bool(mask.any()) for mask in masks):
        raise AttachError(
            "no mask of edit.train has a true entry, so nothing would train. Choose at least one entry, or do not call "
            "edit.train"
        )
