"""Adapters to average, and what is in their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import petune
from petune.backbones.create import Backbone, create_backbone
from tests.trained import NANO, card

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
FILE = "adapter_model.safetensors"
BUILT: dict[str, Any] = {"weights": "none", "num_classes": 3, "image_size": 32, "options": NANO}


def backbone(**options: Any) -> Backbone:
    """A tiny ViT of random weights."""
    return create_backbone("vit_nano", **{**BUILT, **options})


def adapter(
    place: Path, method: str, seed: int, *, start: Path | None = None, weights_seed: int = 0, noise: int = 100
) -> Path:
    """An adapter directory as a run of a seed writes it, with values near those that it started with."""
    made = backbone(seed=weights_seed)
    torch.manual_seed(seed)
    att = petune.attach(made.model, method) if start is None else petune.load(made.model, start)
    generator = torch.Generator().manual_seed(noise + seed)
    with torch.no_grad():
        for p in att.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    said = card(made, "vit_nano", dict(NANO))
    earlier = [] if start is None else [{"path": str(start), "sha256": sha(start), "dataset": None, "epochs": 1}]
    more = {"continued_from": earlier} if earlier else {}
    att.save(place, metadata={**said, "method": method, "training": {"seed": seed, "val_metrics": None}, **more})
    return place


def sha(place: Path) -> str:
    manifest = json.loads((place / "manifest.json").read_text())
    return str(manifest["files"][FILE]["sha256"])


def tensors(place: Path) -> dict[str, Tensor]:
    return load_file(place / FILE)


def config(place: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((place / "adapter_config.json").read_text())
    return content.get("auto_mapping", {}).get("petune", content)


def fresh(method: str, seed: int, tmp_path: Path) -> dict[str, Tensor]:
    """The tensors that a run of this seed starts with."""
    made = backbone()
    torch.manual_seed(seed)
    petune.attach(made.model, method).save(tmp_path / f"start-{seed}")
    return tensors(tmp_path / f"start-{seed}")


def changes(place: Path) -> dict[str, Tensor]:
    """The change of each weight by a LoRA directory, written out."""
    saved, options = tensors(place), config(place)["config"]
    layers = [key.removesuffix(".lora_A.weight") for key in saved if key.endswith(".lora_A.weight")]
    scale = options["lora_alpha"] / options["r"]
    return {
        layer: scale * saved[f"{layer}.lora_B.weight"].double() @ saved[f"{layer}.lora_A.weight"].double()
        for layer in layers
    }


def is_head(key: str) -> bool:
    return key.removeprefix("base_model.model.").startswith("head.")
