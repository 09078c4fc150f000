"""The training steps that benchmarks/speed.py times: petune's, and those of other code on the same model."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from handwritten import AdaptFormerViT
from torch import Tensor, nn
from torch.nn import functional as F

import petune
from petune.data import Dataset, Preprocess, Split, Target
from petune.training.config import TrainConfig
from petune.training.job import TrainJob
from petune.training.loop import Trainer
from petune.training.precision import choose_attention, choose_precision
from petune.training.speed.bf16_weights import store_in_bf16
from petune.training.stop import StopFlag
from petune.training.task_registry import fitted_task

Step = Callable[[], object]
CPU = torch.device("cpu")
CLASSES = 10


@dataclass(frozen=True)
class Size:
    """A model and a batch."""

    name: str
    timm_name: str
    img_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    batch_size: int

    @property
    def shape(self) -> dict[str, int]:
        """The arguments of the model."""
        keys = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
        return {key: getattr(self, key) for key in keys} | {"num_classes": CLASSES}

    @property
    def rows(self) -> int:
        """Number of tokens in a batch."""
        return self.batch_size * ((self.img_size // self.patch_size) ** 2 + 1)

    def model(self) -> nn.Module:
        """Return the plain timm model with random weights: the time does not depend on them."""
        torch.manual_seed(0)
        model: nn.Module = timm.create_model(self.timm_name, **self.shape)
        return model

    def batch(self) -> tuple[Tensor, Tensor]:
        """Return images (B, 3, S, S) and labels (B,)."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.batch_size, 3, self.img_size, self.img_size, generator=generator)
        return x, torch.randint(0, CLASSES, (self.batch_size,), generator=generator)


SIZES = {
    "vit_base_32": Size("ViT-B, 32x32, patch 4, batch 32", "vit_base_patch16_224", 32, 4, 768, 12, 12, 32),
    "vit_base_224": Size("ViT-B, 224x224, patch 16, batch 8", "vit_base_patch16_224", 224, 16, 768, 12, 12, 8),
    "vit_nano": Size("vit_nano, 32x32, patch 4, batch 128", "vit_tiny_patch16_224", 32, 4, 192, 6, 3, 128),
    "toy": Size("toy, 16x16, patch 4, batch 4", "vit_tiny_patch16_224", 16, 4, 24, 2, 2, 4),
}


def dataset_of(size: Size, count: int, val: int = 0) -> Dataset:
    """Return noise in the shape of images."""

    def split(n: int, seed: int) -> Split:
        generator = np.random.default_rng(seed)
        images = generator.integers(0, 256, (n, size.img_size, size.img_size, 3), dtype=np.uint8)
        return Split.of(images, np.arange(n, dtype=np.int64) % CLASSES)

    names = tuple(str(i) for i in range(CLASSES))
    return Dataset("noise", Target("class", names), "made", "light", split(count, 0), split(val, 1), split(CLASSES, 2))


def trainer_of(
    size: Size,
    method: str,
    directory: Path,
    *,
    images: int = 0,
    val: int = 0,
    device: torch.device = CPU,
    **settings: Any,
) -> Trainer:
    """Return petune's trainer on noise, configured as `petune run` does by default."""
    data = dataset_of(size, images or 2 * size.batch_size, val)
    recipe = {"lr": 1e-4, "weight_decay": 0.01, "optimizer": "adamw", "augment": "light", "batch_size": size.batch_size}
    att = petune.attach(size.model().to(device), method, keep_original=False)
    job = TrainJob(
        attachment=att,
        task=fitted_task("classification", data),
        dataset=data,
        preprocess=Preprocess(size.img_size, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        config=TrainConfig.build(recipe | settings),
        device=device,
        directory=directory,
    )
    return Trainer(job, stop=StopFlag())


@contextlib.contextmanager
def petune_step(size: Size, method: str = "adaptformer", **settings: Any) -> Iterator[Step]:
    """Yield petune's step: what `petune run` does with a batch that is in memory."""
    with tempfile.TemporaryDirectory() as directory:
        trainer = trainer_of(size, method, Path(directory), **settings)
        batch = next(iter(trainer.batches.epoch(0)))
        with trainer.speedups():
            trainer.att.train()
            yield lambda: trainer.step(batch)


def plain_step(model: nn.Module, size: Size, bf16: bool, device: torch.device = CPU, compiled: bool = False) -> Step:
    """Return a step as tutorials write it."""
    model = model.to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    x, y = (tensor.to(device) for tensor in size.batch())
    forward = torch.compile(model, dynamic=False) if compiled else model

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(forward(x), y)
        loss.backward()
        optimizer.step()

    return step


@contextlib.contextmanager
def full(size: Size, bf16: bool = False) -> Iterator[Step]:
    """Yield a step of timm's model, of which everything trains."""
    yield plain_step(size.model().train(), size, bf16)


@contextlib.contextmanager
def peft_lora(size: Size, bf16: bool) -> Iterator[Step]:
    """Yield a step of PEFT's LoRA as its documentation shows it; one target per block, as AdaptFormer has."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=16, target_modules=["qkv"], lora_dropout=0.1, modules_to_save=["head"])
    yield plain_step(get_peft_model(size.model(), config).train(), size, bf16)


def injected(size: Size) -> nn.Module:
    """Return timm's ViT with petune's AdaptFormer attached, in train mode."""
    att = petune.attach(size.model(), "adaptformer")
    return att.train()


def written_out(size: Size) -> nn.Module:
    """Return the hand-written model with the same weights, in train mode; its frozen parts have no dropout."""
    return AdaptFormerViT(**size.shape).copy_from(injected(size)).train()


@contextlib.contextmanager
def bare(size: Size, make: Callable[[Size], nn.Module], stored: bool) -> Iterator[Step]:
    """Yield a step of one of the two models in a bare loop, with petune's number format and attention kernel.

    Args:
        size: Of the model.
        make: Creates the model.
        stored: Whether frozen weights are stored in bfloat16, as petune does.
    """
    model = make(size)
    precision = choose_precision("auto", CPU)
    choose_attention(model, CPU, precision)
    for module in model.modules():
        if hasattr(module, "fused"):
            module.fused = precision == "fp32"
    bf16 = precision == "bf16"
    x = size.batch()[0][:2]

    def logits() -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.random.fork_rng():
            torch.manual_seed(0)
            return model(x)

    with store_in_bf16(model, logits) if stored and bf16 else contextlib.nullcontext():
        yield plain_step(model, size, bf16)


PEERS: dict[str, Callable[[Size], contextlib.AbstractContextManager[Step]]] = {
    "petune adaptformer": petune_step,
    "injected, bare loop": lambda size: bare(size, injected, stored=True),
    "hand-written, bare loop": lambda size: bare(size, written_out, stored=True),
    "hand-written, autocast": lambda size: bare(size, written_out, stored=False),
    "PEFT LoRA, fp32": lambda size: peft_lora(size, bf16=False),
    "PEFT LoRA, bf16 autocast": lambda size: peft_lora(size, bf16=True),
    "timm full, fp32": full,
}
COMPILED = "petune adaptformer, compiled"
EXTRA = {COMPILED: lambda size: petune_step(size, compile=True)}


def methods_of(names: list[str]) -> dict[str, Callable[[Size], contextlib.AbstractContextManager[Step]]]:
    """Return petune's steps with other methods, by the name that the table shows."""
    return {f"petune {name}": functools.partial(petune_step, method=name) for name in names}
