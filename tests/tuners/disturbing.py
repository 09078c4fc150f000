"""Tuners that disturb what is not theirs: the model they are attached to, other models, torch, or a resumed run."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import petune


class Low(nn.Module):
    """A sound adapter: up(down(x)), zero at the start. The tuners below break one thing about it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, 2), nn.Linear(2, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(self.down(x))
        return out


class Sound(petune.Tuner[petune.TunerConfig]):
    adapter: type[nn.Module] = Low

    def attach(self, edit: petune.Edit) -> None:
        for block in edit.sites.require_blocks():
            edit.parallel(block.mid, block, self.adapter(block.dim))


def broken(adapter: type[nn.Module]) -> Sound:
    return type("Broken", (Sound,), {"adapter": adapter})()


class WithNorm(Low):
    """Normalizes as the backbone does, by a function that it is given."""

    def __init__(self, dim: int, norm: Any) -> None:
        super().__init__(dim)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class ClosesOver(Sound):
    def attach(self, edit: petune.Edit) -> None:
        for block in edit.sites.require_blocks():
            norm = block.norm2.module
            edit.parallel(block.mid, block, WithNorm(block.dim, lambda x, norm=norm: norm(x)))


class Registers(Sound):
    def attach(self, edit: petune.Edit) -> None:
        for block in edit.sites.require_blocks():
            edit.parallel(block.mid, block, WithNorm(block.dim, block.norm2.module))


class Float32Only(Low):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ torch.eye(x.shape[-1])


class NoDtype(Sound):
    """Promotes what timm's next layer reads, so that timm's code fails, and no line of this file."""

    def attach(self, edit: petune.Edit) -> None:
        shift = nn.Parameter(torch.zeros(edit.sites.embed_dim))
        edit.model.blocks[0].shift = shift
        handle = edit.model.blocks[0].register_forward_hook(lambda module, args, y: y + module.shift)
        edit.add_parameters([shift])
        edit.on_detach(handle.remove)


class DrawsFromPython(Low):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (random.random() if self.training else 1.0)


class DrawsFromNumpy(Low):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (float(np.random.rand()) if self.training else 1.0)


class DrawsFromItsOwn(Low):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.generator = np.random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (float(self.generator.random()) if self.training else 1.0)


class Seeds(Low):
    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return super().forward(x)


class CountsSteps(Sound):
    """Scales its loss by a count of steps that no file holds."""

    steps = 0

    def on_step_end(self, step: int) -> None:
        self.steps += 1
        for holder in self.adapters:
            with torch.no_grad():
                holder.up.bias.add_(0.01 * self.steps)

    def attach(self, edit: petune.Edit) -> None:
        self.adapters = [Low(block.dim) for block in edit.sites.require_blocks()]
        for block, adapter in zip(edit.sites.blocks, self.adapters, strict=True):
            edit.parallel(block.mid, block, adapter)


class Calibrated(CountsSteps):
    def on_step_end(self, step: int) -> None: ...

    def calibrate(self, batches: Iterable[petune.CalibrationBatch]) -> None:
        for batch in batches:
            self.read(batch)

    def read(self, batch: petune.CalibrationBatch) -> None: ...


class ChangesAdapter(Calibrated):
    def read(self, batch: petune.CalibrationBatch) -> None:
        with torch.no_grad():
            self.adapters[0].down.weight.fill_(0.1)


class ChangesBackbone(Calibrated):
    def read(self, batch: petune.CalibrationBatch) -> None:
        with torch.no_grad():
            batch.model.norm.weight.mul_(1.1)


class LeavesGradient(Calibrated):
    def attach(self, edit: petune.Edit) -> None:
        super().attach(edit)
        self.probe = torch.ones(3, requires_grad=True)

    def read(self, batch: petune.CalibrationBatch) -> None:
        (batch.loss() * self.probe.sum()).backward()


class LeavesAttribute(Sound):
    def attach(self, edit: petune.Edit) -> None:
        super().attach(edit)
        edit.model.blocks[0].mlp.rank = 4


class ChangesAttribute(Sound):
    def attach(self, edit: petune.Edit) -> None:
        super().attach(edit)
        edit.model.blocks[0].norm1.eps = 1e-6 * 1.0000001


class LeavesTensorHook(Sound):
    def attach(self, edit: petune.Edit) -> None:
        super().attach(edit)
        edit.model.blocks[0].norm1.weight.register_post_accumulate_grad_hook(lambda p: None)


class LeavesLoadHook(Sound):
    def attach(self, edit: petune.Edit) -> None:
        super().attach(edit)
        edit.model.register_load_state_dict_post_hook(lambda *_: None)


class ChangesClass(Sound):
    def attach(self, edit: petune.Edit) -> None:
        super().attach(edit)
        block = edit.model.blocks[0]
        block.__class__ = type("OtherBlock", (type(block),), {})


class LeavesBuffer(Sound):
    def attach(self, edit: petune.Edit) -> None:
        super().attach(edit)
        edit.model.blocks[0].register_buffer("kept", torch.zeros(1), persistent=False)


class FreezesWhileTraining(Sound):
    """Takes a flag away from a parameter that another verb trains."""

    def attach(self, edit: petune.Edit) -> None:
        super().attach(edit)
        self.weights = edit.train([edit.model.blocks[0].norm1.weight])

    def on_step_end(self, step: int) -> None:
        for weight in self.weights:
            weight.requires_grad_(step < 2)

    def on_train_start(self, total_steps: int) -> None:
        for weight in self.weights:
            weight.requires_grad_(True)


class FlipsModeWhileTraining(Sound):
    def on_train_start(self, total_steps: int) -> None:
        self.module.train(not self.module.training)

    def attach(self, edit: petune.Edit) -> None:
        super().attach(edit)
        self.module = edit.model.blocks[0].attn


class PatchesClass(Sound):
    def attach(self, edit: petune.Edit) -> None:
        super().attach(edit)
        kind = type(edit.model.blocks[0].attn)
        original = kind.forward
        kind.forward = lambda module, *args, **kwargs: original(module, *args, **kwargs)


class PatchesClassInTraining(Sound):
    def attach(self, edit: petune.Edit) -> None:
        super().attach(edit)
        self.kind = type(edit.model.blocks[0].attn)

    def on_train_start(self, total_steps: int) -> None:
        original = self.kind.forward
        self.kind.forward = lambda module, *args, **kwargs: original(module, *args, **kwargs)


class ChangesDefaultDtype(Sound):
    def attach(self, edit: petune.Edit) -> None:
        super().attach(edit)
        torch.set_default_dtype(torch.float64)


class HooksAllModules(Sound):
    def attach(self, edit: petune.Edit) -> None:
        super().attach(edit)
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
        edit.on_detach(handle.remove)


CASES: list[tuple[Any, str, str]] = [
    (ClosesOver(), "deep copy", "WithNorm.norm (disturbing.py:"),
    (Registers(), "foreign tensors", "norm.weight of the adapter WithNorm belongs to the backbone"),
    (broken(Float32Only), "number formats", "(disturbing.py:"),
    (broken(DrawsFromPython), "random numbers", "Draw from torch's generator"),
    (broken(DrawsFromNumpy), "random numbers", "Draw from torch's generator"),
    (broken(DrawsFromItsOwn), "random numbers", "Draw from torch's generator"),
    (broken(Seeds), "random numbers", "sets the seed of torch"),
    (CountsSteps(), "random numbers", "keep what must survive in buffers"),
    (ChangesAdapter(), "calibration", "down.weight differs after calibrate"),
    (ChangesBackbone(), "calibration", "norm.weight of the backbone differs after calibrate"),
    (LeavesGradient(), "calibration", "leaves a gradient"),
    (LeavesAttribute(), "detach", "blocks.0.mlp has the attribute rank"),
    (ChangesAttribute(), "detach", "blocks.0.norm1 has eps = "),
    (LeavesTensorHook(), "detach", "blocks.0.norm1.weight has a hook that was left behind"),
    (LeavesLoadHook(), "detach", "the model has a hook that was left behind"),
    (ChangesClass(), "detach", "blocks.0 is now a OtherBlock"),
    (LeavesBuffer(), "detach", "blocks.0 has other buffers: ['kept']"),
    (FreezesWhileTraining(), "flags", "requires_grad of blocks.0.norm1.weight"),
    (FlipsModeWhileTraining(), "flags", "the mode of blocks.0.attn"),
    (PatchesClass(), "surroundings", "forward of the class Attention was replaced"),
    (PatchesClassInTraining(), "detach", "forward of the class Attention was replaced"),
    (ChangesDefaultDtype(), "surroundings", "the default dtype is now torch.float64"),
    (HooksAllModules(), "surroundings", "a hook for the modules of all models"),
]
"""Each with the property that it breaks, and a part of the message."""
