"""Save adapters in one environment, or load them in another one; `benchmarks/versions.py` runs this file in both.

It imports petune and the libraries only, so it runs in any environment that has them.

    python benchmarks/versions_worker.py save DIR REPORT.json [MODEL ...]
    python benchmarks/versions_worker.py load DIR REPORT.json [MODEL ...]
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

import petune

METHODS = {
    "linear": {},
    "adaptformer": {"bottleneck": 4},
    "vpt": {"num_prompts": 3},
    "houlsby": {"bottleneck": 4},
    "pfeiffer": {"bottleneck": 4},
    "repadapter": {"bottleneck": 4},
    "fact": {"rank": 4},
    "lst": {},
    "bitfit": {},
    "norm": {},
    "partial": {},
    "full": {},
    "lora": {"r": 4},
    "dora": {"r": 4},
    "peft:ia3": {},
    "peft:loha": {},
}
SMALL = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = {**SMALL, "intermediate_size": 64}
WINDOWS = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
NUM_CLASSES = 5
TOLERANCE = 1e-5
"""Largest difference of the logits, relative to the largest logit, that counts as the same."""


def of_transformers(name: str, options: dict[str, Any]) -> Callable[[Path], nn.Module]:
    """Return a function that builds a model of transformers, or loads the one that is saved in a directory."""

    def build(path: Path) -> nn.Module:
        cls = getattr(transformers, f"{name}ForImageClassification")
        if path.exists():
            model: nn.Module = cls.from_pretrained(path)
            return model
        model = randomised(cls(getattr(transformers, f"{name}Config")(num_labels=NUM_CLASSES, **options)))
        model.save_pretrained(path)  # type: ignore[operator]
        return model

    return build


def of_other_library(create: Callable[[], nn.Module]) -> Callable[[Path], nn.Module]:
    """Return a function that builds a model, and takes its weights from a directory if they are there."""

    def build(path: Path) -> nn.Module:
        model = randomised(create())
        file = path / "weights.pt"
        if file.exists():
            model.load_state_dict(torch.load(file, weights_only=True))
        else:
            path.mkdir(parents=True)
            torch.save(model.state_dict(), file)
        return model

    return build


def of_timm(name: str, **options: Any) -> Callable[[Path], nn.Module]:
    """Return a function that builds a model of timm; see `of_other_library`."""
    return of_other_library(lambda: timm.create_model(name, num_classes=NUM_CLASSES, **options))


def torchvision_vit() -> nn.Module:
    """Return a small ViT of torchvision."""
    sizes = {"num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
    return torchvision.models.VisionTransformer(image_size=32, patch_size=8, num_classes=NUM_CLASSES, **sizes)


def randomised(model: nn.Module) -> nn.Module:
    """Add noise to all parameters: biases, norms and tokens of pretrained models are no constants either."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model.eval()


MODELS = {
    "transformers ViT": of_transformers("ViT", WIDE),
    "transformers DeiT": of_transformers("DeiT", WIDE),
    "transformers DINOv2": of_transformers("Dinov2", {**SMALL, "mlp_ratio": 2}),
    "transformers DINOv2 with registers": of_transformers("Dinov2WithRegisters", {**SMALL, "mlp_ratio": 2}),
    "transformers BEiT": of_transformers("Beit", WIDE),
    "transformers Swin": of_transformers("Swin", WINDOWS),
    "transformers Swin V2": of_transformers("Swinv2", WINDOWS),
    "timm ViT": of_timm("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2),
    "timm BEiT": of_timm("beit_base_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=48, num_heads=3),
    "timm EVA-02": of_timm("eva02_tiny_patch14_224", img_size=56, depth=2),
    "timm Swin": of_timm("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), embed_dim=24),
    "torchvision ViT": of_other_library(torchvision_vit),
}


def logits(model: nn.Module, size: tuple[int, ...]) -> Tensor:
    """Return the logits of two fixed images of a size (channels, height, width)."""
    x = torch.linspace(-1, 1, 2 * size[0] * size[1] * size[2]).reshape(2, *size)
    with torch.no_grad():
        output = model(x)
    return output if isinstance(output, Tensor) else output.logits


def train_a_little(attachment: petune.Attachment) -> None:
    """Move what trains, so that a tensor that lands in another place shows in the logits."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in attachment.state().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.05)


def save(directory: Path, names: list[str]) -> dict[str, Any]:
    """Save the models, and an adapter of every method on each, with the logits that it computes."""
    report: dict[str, Any] = {}
    for name in names:
        build = MODELS[name]
        path = directory / name.replace(" ", "-")
        build(path / "backbone")
        for method, options in METHODS.items():
            report[f"{name}|{method}"] = attempt(lambda: save_one(build, path, method, options))  # noqa: B023
    return report


def save_one(build: Callable[[Path], nn.Module], path: Path, method: str, options: dict[str, Any]) -> str:
    """Save one adapter, and the logits of the model with it and without it."""
    model = build(path / "backbone")
    size = petune.find_sites(model).input_size
    base = logits(model, size)
    attachment = petune.attach(model, method, **options)
    train_a_little(attachment)
    model.eval()
    target = path / method.replace(":", "-")
    attachment.save(target / "adapter")
    torch.save({"base": base, "tuned": logits(model, size)}, target / "logits.pt")
    return "saved"


def load(directory: Path, names: list[str]) -> dict[str, Any]:
    """Load the adapters of these models, and compare the logits."""
    report: dict[str, Any] = {}
    for name in names:
        build = MODELS[name]
        path = directory / name.replace(" ", "-")
        for method in METHODS:
            target = path / method.replace(":", "-")
            if (target / "logits.pt").is_file():
                report[f"{name}|{method}"] = attempt(lambda: load_one(build, path, target))  # noqa: B023
    return report


def load_one(build: Callable[[Path], nn.Module], path: Path, target: Path) -> str:
    """Load one adapter; return `ok`, or what differs."""
    expected = torch.load(target / "logits.pt", weights_only=True)
    try:
        model = build(path / "backbone")
    except RuntimeError as error:
        return f"the library itself does not load these weights: {' '.join(str(error).split())}"
    size = petune.find_sites(model).input_size
    before = difference(logits(model, size), expected["base"])
    if before > TOLERANCE:
        return f"the backbone itself differs by {before:.1e}"
    petune.load(model, target / "adapter")
    after = difference(logits(model.eval(), size), expected["tuned"])
    return "ok" if after <= TOLERANCE else f"WRONG: differs by {after:.1e}"


def difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of logits, relative to the largest logit."""
    return float((a - b).abs().max() / b.abs().max())


def attempt(work: Callable[[], str]) -> str:
    """Return what `work` returns, or its error."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            answer = work()
        told = sorted({str(w.message) for w in caught if "petune" in str(w.filename)})
        return answer if not told else f"{answer} ({'; '.join(told)})"
    except petune.PetuneError as error:
        return f"{type(error).__name__}: {error}"
    except Exception as error:
        return f"CRASH {type(error).__name__}: {error}"


def main() -> None:
    """Save or load, and write the report."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    command, directory, file = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    names = sys.argv[4:] or list(MODELS)
    report = save(directory, names) if command == "save" else load(directory, names)
    file.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
