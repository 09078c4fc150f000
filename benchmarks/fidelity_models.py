"""Methods whose authors' code has a ViT of its own, or changes timm's: each beside petune's.

Legend: B batch, C channels, O outputs, R rank (also S and T).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from fidelity_pairs import BOTTLENECK, DEPTH, WIDTH, Built, Pair, attached, backbone, copy_weights, same_names
from official_code import load
from torch import Tensor, nn


def adaptformer(root: Path, *, prompts: int = 0) -> Built:
    """AdaptFormer's own ViT, with its adapters or its prompts."""
    config = SimpleNamespace(
        ffn_adapt=not prompts, ffn_option="parallel", ffn_adapter_layernorm_option="none", d_model=WIDTH,
        ffn_adapter_init_option="lora", ffn_adapter_scalar="0.1", ffn_num=BOTTLENECK, vpt_on=prompts > 0,
        vpt_num=prompts,
    )  # fmt: skip
    official = load(root, "models.vit_image").vit_base_patch16(num_classes=10, tuning_config=config)
    official.blocks = official.blocks[:DEPTH]
    model, attachment = attached(f"vpt:num_prompts={prompts}" if prompts else f"adaptformer:bottleneck={BOTTLENECK}")
    _copy_split_qkv(backbone(), official.double().eval())
    pairs: list[Pair] = []
    for i in range(DEPTH):
        if prompts:
            pairs.append(Pair(official.embeddings[i], attachment.tuned[f"blocks.{i}.petune_vpt.adapter.tokens"]))
        else:
            place, names = f"blocks.{i}.petune_adaptformer", {"down": "down_proj", "up": "up_proj"}
            pairs += same_names(official.blocks[i].adaptmlp, attachment, place, names)
    return Built(official, model, pairs, attachment)


def _copy_split_qkv(model: Any, official: Any) -> None:
    """Copy timm's weights into a ViT whose q, k and v are three layers and whose MLP has no module of its own."""
    state = {}
    for name, value in model.state_dict().items():
        if ".qkv." in name:
            for part, chunk in zip("qkv", value.chunk(3), strict=True):
                state[name.replace("qkv", f"{part}_proj")] = chunk
        else:
            state[name.replace(".mlp.", ".")] = value
    missing = set(official.load_state_dict(state, strict=False).missing_keys)
    assert all("adaptmlp" in name or "embeddings" in name for name in missing), missing


def fact(root: Path, *, form: str, mlp: bool = True) -> Built:
    """FacT, set on timm's ViT; without `mlp`, only the attention's matrices change."""
    stubs = ["vtab", "avalanche", "avalanche.evaluation", "avalanche.evaluation.metrics"]
    module = load(root / "FacT", f"fact_{form}", stubs=[*stubs, "avalanche.evaluation.metrics.accuracy"])
    official = backbone()
    for block in official.blocks:
        block.mlp.drop = nn.Identity()  # its name in older versions of timm
    module.vit = official  # their functions read it as a global variable
    module.set_FacT(official, dim=BOTTLENECK, s=1.0)
    for block in official.blocks:
        block.attn.forward = _without_mask(block.attn.forward)
    model, attachment = attached(f"fact:form={form},rank={BOTTLENECK}")
    tuned = attachment.tuned
    first = "blocks.0.attn.petune_fact_qkv.adapter"
    pairs = [
        Pair(official.FacTu.weight, tuned[f"{first}.u"], torch.t),
        Pair(official.FacTv.weight, tuned[f"{first}.v"]),
    ]
    if form == "tt":
        pairs += _fact_tt(official, tuned)
    else:
        pairs.append(Pair(official.FacTc, tuned[f"{first}.shared_core"], lambda core_RST: core_RST.permute(2, 0, 1)))
        pairs += _fact_tk(official, tuned, mlp=mlp)
    return Built(official.double().eval(), model, pairs, attachment)


def _without_mask(forward: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Return a forward of attention that can be called as newer versions of timm do; there is no mask."""
    return lambda x, **options: forward(x)


def _fact_tt(official: Any, tuned: Any) -> Iterator[Pair]:
    rank = BOTTLENECK
    for i, block in enumerate(official.blocks):
        for o, name in enumerate(("q_FacTs", "k_FacTs", "v_FacTs")):
            core = tuned[f"blocks.{i}.attn.petune_fact_qkv.adapter.core"]
            yield Pair(getattr(block.attn, name).weight, core, torch.t, lambda value, o=o: value[0, o])
        core = tuned[f"blocks.{i}.attn.petune_fact_proj.adapter.core"]
        yield Pair(block.attn.proj_FacTs.weight, core, lambda w: w.T[None, None])
        core = tuned[f"blocks.{i}.mlp.petune_fact_fc1.adapter.core"]
        yield Pair(block.mlp.fc1_FacTs.weight, core, lambda w: w.reshape(4, rank, rank).transpose(1, 2)[None])
        core = tuned[f"blocks.{i}.mlp.petune_fact_fc2.adapter.core"]
        yield Pair(block.mlp.fc2_FacTs.weight, core, lambda w: w.reshape(rank, 4, rank).permute(1, 2, 0)[:, None])


def _fact_tk(official: Any, tuned: Any, *, mlp: bool) -> Iterator[Pair]:
    """Their rows of P are columns of one matrix: 3 of qkv, 1 of proj, 4 and 4 of the MLP of each block."""
    places = ["attn.petune_fact_qkv", "attn.petune_fact_proj", "mlp.petune_fact_fc1", "mlp.petune_fact_fc2"]
    start = 0
    for i, block in enumerate(official.blocks):
        for place in places:
            own = tuned[f"blocks.{i}.{place}.adapter.p"]
            columns = slice(start, start + own.numel() // BOTTLENECK)
            start = columns.stop
            if mlp or place.startswith("attn"):
                yield Pair(official.FacTp, own, lambda p_TO, c=columns, shape=own.shape: p_TO[:, c].T.reshape(shape))
            else:
                own.data.zero_()
        if not mlp:
            del block.mlp.forward  # timm's own again


def repadapter(root: Path) -> Built:
    """RepAdapter, set on timm's ViT."""
    module = load(root, "repadapter")
    official = backbone()
    module.set_RepAdapter(official, "repblock", dim=BOTTLENECK, s=1)
    official.double().eval()
    model, attachment = attached(f"repadapter:bottleneck={BOTTLENECK}")
    pairs: list[Pair] = []
    for i, block in enumerate(official.blocks):
        for site in ("attn", "mlp"):
            place, names = f"blocks.{i}.petune_repadapter_{site}", {"down": "conv_A", "up": "conv_B"}
            pairs += same_names(getattr(block, f"adapter_{site}"), attachment, place, names)

    def merge() -> None:
        module.set_RepWeight(official, "repblock", dim=BOTTLENECK, s=1)
        for block in official.blocks:
            del block.forward  # timm's own again

    return Built(official, model, pairs, attachment, merge)


def convpass(root: Path, *, gelu: bool) -> Built:
    """Convpass, set on timm's ViT; with `gelu`, the activation of petune in place of QuickGELU."""
    module = load(root / "convpass" / "vtab", "convpass")
    official = backbone()
    module.set_Convpass(official, "convpass", dim=8, s=1.0, xavier_init=True)
    for block in official.blocks:
        block.drop_path = nn.Identity()  # its name in older versions of timm
        if gelu:
            block.adapter_attn.act = block.adapter_mlp.act = nn.GELU()
    official.double().eval()
    model, attachment = attached("convpass")
    pairs: list[Pair] = []
    names = {"down": "adapter_down", "up": "adapter_up", "conv": "adapter_conv"}
    for i, block in enumerate(official.blocks):
        for site in ("attn", "mlp"):
            place = f"blocks.{i}.petune_convpass_{site}"
            pairs += same_names(getattr(block, f"adapter_{site}"), attachment, place, names)
    return Built(official, model, pairs, attachment)


def ssf(root: Path, *, patch_embedding: bool) -> Built:
    """SSF's own ViT; its scale and shift of the patch embedding are 1 and 0, or random."""
    module = load(root, "models.vision_transformer", stubs=["ipdb"], packages=["models"])
    official = module.VisionTransformer(
        patch_size=16, embed_dim=WIDTH, depth=DEPTH, num_heads=12, num_classes=10, tuning_mode="ssf"
    ).double()
    model, attachment = attached("ssf")
    copy_weights(backbone(), official.eval(), "ssf_")
    places = {"petune_ssf_norm": (official, 1)}
    for i, block in enumerate(official.blocks):
        places |= {f"blocks.{i}.petune_ssf_norm{number}": (block, number) for number in (1, 2)}
        places |= {
            f"blocks.{i}.attn.petune_ssf_qkv": (block.attn, 1),
            f"blocks.{i}.attn.petune_ssf_proj": (block.attn, 2),
        }
        places |= {f"blocks.{i}.mlp.petune_ssf_fc{number}": (block.mlp, number) for number in (1, 2)}
    pairs = []
    for place, (owner, number) in places.items():
        for kind in ("scale", "shift"):
            own = attachment.tuned[f"{place}.adapter.{kind}"]
            pairs.append(Pair(getattr(owner, f"ssf_{kind}_{number}"), own))
    embedding = official.patch_embed
    with torch.no_grad():
        embedding.ssf_scale_1.fill_(1).add_(0.02 * patch_embedding * torch.randn(WIDTH))
        embedding.ssf_shift_1.zero_().add_(0.02 * patch_embedding * torch.randn(WIDTH))
    return Built(official, model, pairs, attachment)
