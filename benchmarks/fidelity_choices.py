"""Methods that choose what trains on images, beside their authors' code: GPS and SCT.

Both are given the same images; what their authors' code chooses is where its parameters are, so another choice of
petune's shows in logits and gradients.

Legend: B images, C channels, H and W pixels, D width.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from fidelity_pairs import BOTTLENECK, WIDTH, Built, Pair, attached, backbone, copy_weights, same_names
from official_code import load
from torch import Tensor, nn


def gps(root: Path, *, per_output: int = 2) -> Built:
    """GPS's loss and masks; entries that do not train keep the values of timm's ViT."""
    images = _images()
    masks = _gps_masks(root, images, per_output)
    official = backbone()
    free = {name: nn.Parameter(torch.zeros_like(official.get_parameter(name))) for name in masks}
    model, attachment = attached(f"gps:per_output={per_output}")
    attachment.calibrate([images])
    pairs = []
    for place in ("patch_embed.proj", *(f"blocks.{i}" for i in range(len(official.blocks)))):
        own = attachment.tuned[f"{place}.petune_gps_entries.values"]
        start = 0
        for name in (name for name in masks if name.startswith(f"{place}.")):
            mask, count = masks[name], int(masks[name].sum())
            select = slice(start, start + count)
            pairs.append(Pair(free[name], own, lambda value, m=mask: value[m], lambda value, s=select: value[s]))
            start += count
        assert start == own.numel(), f"{place}: {start} entries of theirs, {own.numel()} of petune"

    def logits(x_BCHW: Tensor) -> Tensor:
        state = {name: torch.where(masks[name], free[name], official.get_parameter(name)) for name in masks}
        return torch.func.functional_call(official, state, (x_BCHW,))

    return Built(logits, model, pairs, attachment)


def _gps_masks(root: Path, images: tuple[Tensor, Tensor], per_output: int) -> dict[str, Tensor]:
    """Return what their code lets train, of everything but the classifier."""
    pruning = load(root, "utils.pruning", packages=["utils"])
    contrastive = load(root, "utils.loss_utils", packages=["utils"]).SupConLoss()
    model = backbone()
    features_BD = model.forward_head(model.forward_features(images[0]), pre_logits=True)
    contrastive(features_BD[:, None], images[1]).backward()
    with _on_cpu(), contextlib.redirect_stdout(io.StringIO()):
        frozen = pruning.prune_by_percentile_gradient_perCell(model, per_output)
    found = {name: mask == 0 for name, mask in frozen.items() if not name.startswith("head.")}
    return {name: mask for name, mask in found.items() if mask.any()}


def sct(root: Path, *, place: str) -> Built:
    """SCT's channels, and its own ViT with them."""
    images = _images()
    avalanche = ["avalanche", "avalanche.evaluation", "avalanche.evaluation.metrics"]
    stubs = [*avalanche, f"{avalanche[-1]}.accuracy", "logger", "psutil", "tqdm", "models", "utils"]
    train = load(root, "train_model_sct", stubs=stubs)
    train.create_model = lambda *args, **options: backbone()
    mode = f"sct_{place}"
    with _on_cpu():
        chosen = train.getSalientChannels("", "", [images], BOTTLENECK, WIDTH, len(backbone().blocks), mode)
    module = load(root, "models.vision_transformer_sct", packages=["models"])
    official = module.VisionTransformer_sct(
        embed_dim=WIDTH, depth=len(backbone().blocks), num_classes=10, tuning_mode=mode, channel_index_dict=chosen,
        topN=BOTTLENECK,
    ).double().eval()  # fmt: skip
    copy_weights(backbone(), official, f".{mode}.")
    model, attachment = attached(f"sct:place={place},num_channels={BOTTLENECK}")
    attachment.calibrate([images])
    pairs: list[Pair] = []
    site = {"attn": "mid", "mlp": "mlp"}[place]
    for i, block in enumerate(official.blocks):
        own = f"blocks.{i}.petune_sct_{site}"
        pairs += same_names(getattr(block, mode), attachment, own, {"linear": "adapt_linear"})
    return Built(official, model, pairs, attachment)


def _images() -> tuple[Tensor, Tensor]:
    """Return images of three classes, none of them alone."""
    generator = torch.Generator().manual_seed(4)
    x_BCHW = torch.randn(6, 3, 224, 224, generator=generator, dtype=torch.float64)
    return x_BCHW, torch.tensor([0, 1, 2, 0, 1, 2])


@contextlib.contextmanager
def _on_cpu() -> Iterator[None]:
    """Let code that calls `.cuda()` run without a GPU."""

    def same(value: Any, *args: Any) -> Any:
        return value

    before = Tensor.cuda, nn.Module.cuda
    Tensor.cuda = nn.Module.cuda = same  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Tensor.cuda, nn.Module.cuda = before  # type: ignore[method-assign]
