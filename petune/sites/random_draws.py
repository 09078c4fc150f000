"""Find the modules of a model that draw random numbers in training: dropout, drop path, attention with dropout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode

from petune.sites.forward import dry_forward
from petune.sites.input_spec import InputSpec


@dataclass
class RandomDraws:
    """Modules of one forward in train mode. A layer with a rate of zero draws nothing.

    Attributes:
        drawing: Those that draw random numbers themselves, in the order of the forward.
        around: Those that are called around them. Their own train mode may decide whether the inner ones are called:
            in eval mode nn.TransformerEncoderLayer runs as one kernel without dropout.
    """

    drawing: tuple[nn.Module, ...] = ()
    around: tuple[nn.Module, ...] = ()


def find_random_draws(model: nn.Module, spec: InputSpec) -> RandomDraws:
    """Return what draws random numbers in a forward in which all modules but the BatchNorms are in train mode.

    Args:
        model: Modes and random state are as before afterwards.
        spec: What it takes.

    Raises:
        AttachError: The forward fails on such inputs.
    """

    @contextlib.contextmanager
    def watch() -> Iterator[_DrawRecorder]:
        for module in model.modules():
            module.training = not keeps_statistics(module)
        with _hooked(model, _DrawRecorder()) as recorder, recorder:
            yield recorder

    recorder: _DrawRecorder = dry_forward(model, spec, watch)
    drawing = tuple(m for m in recorder.drawing if not keeps_statistics(m))
    around = tuple(m for m in recorder.around if not keeps_statistics(m) and m not in recorder.drawing)
    return RandomDraws(drawing, around)


def keeps_statistics(module: nn.Module) -> bool:
    """Return True for a module whose train mode changes buffers, such as BatchNorm."""
    return isinstance(module, _NormBase) or "running_mean" in module._buffers


class _DrawRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records in which calls random operations run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stack: list[nn.Module] = []
        self.drawing: dict[nn.Module, None] = {}
        self.around: dict[nn.Module, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.stack and draws_random_numbers(func, args, kwargs or {}):
            self.drawing[self.stack[-1]] = None
            self.around.update(dict.fromkeys(self.stack[:-1]))
        return func(*args, **(kwargs or {}))


def draws_random_numbers(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Return True for an operation that draws random numbers; fused attention does only with `dropout_p`."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    names = [argument.name for argument in func._schema.arguments]
    if "dropout_p" not in names:
        return True
    position = names.index("dropout_p")
    return bool(kwargs.get("dropout_p", args[position] if position < len(args) else 0.0))


@contextlib.contextmanager
def _hooked(model: nn.Module, recorder: _DrawRecorder) -> Iterator[_DrawRecorder]:
    """Let the recorder know, inside the context, which modules are being called."""

    def enter(module: nn.Module, args: Any) -> None:
        recorder.stack.append(module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        recorder.stack.pop()

    with contextlib.ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        yield recorder
