"""Adapters of several methods on one tiny backbone, for tests of a bank."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import petune
from tests.several import model

METHODS = {
    "pets": ("adaptformer", 4, {}),
    "cars": ("adaptformer", 3, {"bottleneck": 5}),
    "vpt": ("vpt", 7, {"num_prompts": 2}),
    "vpt2": ("vpt", 2, {"num_prompts": 2}),
    "vpt3": ("vpt", 3, {"num_prompts": 4}),
    "shallow": ("vpt", 3, {"deep": False, "num_prompts": 2}),
    "lora": ("lora", 5, {}),
    "lora2": ("lora", 3, {"r": 2}),
    "probe": ("linear", 6, {}),
    "bitfit": ("bitfit", 3, {}),
    "houlsby": ("houlsby", 4, {}),
    "lst": ("lst", 3, {}),
    "ia3": ("peft:ia3", 4, {}),
    "ia3b": ("peft:ia3", 2, {}),
    "ssf": ("ssf", 2, {}),
    "ssf2": ("ssf", 3, {}),
    "norm": ("norm", 2, {}),
    "partial": ("partial", 3, {}),
}


class Trained:
    """Adapters trained alone on the same backbone, each made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.models: dict[str, nn.Module] = {}

    def __getitem__(self, name: str) -> Path:
        """Return the directory of an adapter."""
        self.alone(name)
        return self.root / name

    def alone(self, name: str | None) -> nn.Module:
        """Return a model with an adapter attached; None is the backbone."""
        if name is None:
            return model()
        if name not in self.models:
            method, classes, options = METHODS[name]
            torch.manual_seed(len(name))
            att = petune.attach(model(classes), method, **options)
            with torch.no_grad():
                for p in att.parameters():
                    p.add_(torch.randn_like(p), alpha=0.2)
            att.save(self.root / name)
            self.models[name] = att.model
        return self.models[name]

    def load(self, bank: petune.AdapterBank, *names: str) -> petune.AdapterBank:
        """Load adapters that a bank does not have."""
        for name in names:
            if name not in bank.adapters:
                bank.load(name, self[name])
        return bank
