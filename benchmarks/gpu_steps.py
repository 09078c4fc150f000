"""The training steps that benchmarks/gpu.py times: petune's, PEFT's LoRA, and a plain loop over timm's model."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from speed_peers import SIZES, Size, Step, plain_step, trainer_of

GPU_SIZES = {
    "ViT-B": Size("ViT-B/16, 224x224, batch 128", "vit_base_patch16_224", 224, 16, 768, 12, 12, 128),
    "ViT-L": Size("ViT-L/16, 224x224, batch 64", "vit_large_patch16_224", 224, 16, 1024, 24, 16, 64),
    "toy": SIZES["toy"],
}
REFERENCE = "petune adaptformer"
"""Steps that nothing else is named for are compared with this one."""


@dataclass(frozen=True)
class StepKey:
    """A step of one size.

    Attributes:
        size: A key of `GPU_SIZES`.
        name: A key of `STEPS`.
        compiled: Compile forward and backward with torch.compile.
    """

    size: str
    name: str
    compiled: bool = False

    @property
    def peer(self) -> StepKey:
        """The step that this one is compared with, in turns."""
        return StepKey(self.size, AGAINST.get(self.name, REFERENCE), self.compiled)

    def __str__(self) -> str:
        return f"{self.size}, {self.name}{', compiled' * self.compiled}"


Context = contextlib.AbstractContextManager[Step]
Make = Callable[[Size, torch.device, bool], Context]


def petune(method: str) -> Make:
    """Return what makes petune's step of a method: what `petune run --precision bf16` does with a batch."""

    @contextlib.contextmanager
    def make(size: Size, device: torch.device, compiled: bool) -> Iterator[Step]:
        precision = "bf16" if device.type == "cuda" else "fp32"
        settings = {"precision": precision, "compile": compiled, "augment": "none", "cache_features": "never"}
        with tempfile.TemporaryDirectory() as directory:
            trainer = trainer_of(size, method, Path(directory), device=device, **settings)
            batch = next(iter(trainer.batches.epoch(0)))
            with trainer.speedups():
                trainer.att.train()
                yield lambda: trainer.step(batch)

    return make


@contextlib.contextmanager
def peft_lora(size: Size, device: torch.device, compiled: bool) -> Iterator[Step]:
    """Yield a step of PEFT's LoRA in the layers that petune's `lora` has, under autocast."""
    from peft import LoraConfig, get_peft_model

    layers = r"blocks\..*\.(qkv|proj|fc1|fc2)"
    config = LoraConfig(r=8, lora_alpha=8, target_modules=layers, modules_to_save=["head"])
    model = get_peft_model(size.model(), config).train()
    yield plain_step(model, size, device.type == "cuda", device, compiled)


@contextlib.contextmanager
def timm_full(size: Size, device: torch.device, compiled: bool) -> Iterator[Step]:
    """Yield a step of timm's model, of which everything trains, under autocast."""
    yield plain_step(size.model().train(), size, device.type == "cuda", device, compiled)


STEPS: dict[str, Make] = {
    REFERENCE: petune("adaptformer"),
    "petune lora": petune("lora"),
    "PEFT LoRA": peft_lora,
    "petune full": petune("full"),
    "timm, plain loop": timm_full,
    "petune vpt": petune("vpt"),
    "petune linear": petune("linear"),
}
"""In the order in which they are measured: what is compared with another step comes right after it."""
AGAINST = {"PEFT LoRA": "petune lora", "timm, plain loop": "petune full"}
