"""Methods of plugins, and Adapter+, beside their authors' code; fidelity_choices.py has those that choose what trains.

Legend: B batch, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from fidelity_pairs import (
    BOTTLENECK,
    DEPTH,
    WIDTH,
    Built,
    Pair,
    attached,
    backbone,
    copy_weights,
    randomized,
    same_names,
)
from official_code import load
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

import petune

NORM = partial(nn.LayerNorm, eps=1e-6)
REGISTRY = "timm.models.registry"
"""Its models have names of timm's, and configurations that newer versions of timm refuse."""


def mona(root: Path) -> Built:
    """Mona's own Swin of two stages, with timm's average and classifier."""
    stubs = [
        "mmcv", "mmcv.runner", "mmcv_custom", "mmcls", "mmcls.utils", "mmcls.models", "mmcls.models.builder",
        "mmcls.models.backbones",
    ]  # fmt: skip
    folder = root / "Swin-Transformer-Classification"
    packages = [name for name in stubs if name.startswith("mmcls.models") and not name.endswith("builder")]
    module = load(
        folder, "mmcls.models.backbones.swin_transformer_mona", stubs=[n for n in stubs if n not in packages],
        packages=packages, values={"mmcv.runner.BaseModule": nn.Module},
    )  # fmt: skip
    sizes = {"embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4)}
    official = module.SwinTransformer_mona(**sizes, out_indices=(1,)).double()
    official.eval()  # returns nothing
    model = _swin(sizes)
    state = {name.replace("layers.1.downsample", "layers.0.downsample"): v for name, v in model.state_dict().items()}
    state |= {f"norm1.{kind}": state.pop(f"norm.{kind}") for kind in ("weight", "bias")}
    missing, unexpected = official.load_state_dict(state, strict=False)
    assert all("my_module" in name or "relative_position_index" in name for name in missing), missing
    assert all(name.startswith("head.") for name in unexpected), unexpected
    head = _swin(sizes).head.fc
    model, attachment = attached("mona", model)
    pairs: list[Pair] = []
    for s, stage in enumerate(official.layers):
        for b, block in enumerate(stage.blocks):
            place = f"layers.{s}.blocks.{b}.petune_mona"
            pairs += _mona_pairs(block.my_module_1, attachment, f"{place}_mid")
            pairs += _mona_pairs(block.my_module_2, attachment, place)
    return Built(lambda x_BCHW: head(official(x_BCHW)[0].mean((2, 3))), model, pairs, attachment)


def _swin(sizes: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return randomized(SwinTransformer(**sizes, num_classes=10))


def _mona_pairs(official: Any, attachment: petune.Attachment, place: str) -> Iterator[Pair]:
    convolutions = {f"filters.sizes.{i}": f"adapter_conv.conv{i + 1}" for i in range(3)}
    names = {"norm": "norm", "down": "project1", "up": "project2", "filters.pointwise": "adapter_conv.projector"}
    yield from same_names(official, attachment, place, names | convolutions)
    yield Pair(official.gamma, attachment.tuned[f"{place}.adapter.norm_scale"])
    yield Pair(official.gammax, attachment.tuned[f"{place}.adapter.input_scale"])


def dyt(root: Path, *, training: bool) -> Built:
    """DyT's own ViT; in training with the noise of its gates and the loss that keeps the share of tokens."""
    config = SimpleNamespace(
        d_model=WIDTH, ffn_num=BOTTLENECK, ffn_adapter_init_option="lora", ffn_adapter_scalar="0.1",
        ffn_adapter_layernorm_option="none",
    )  # fmt: skip
    module = load(root, "models.vision_transformer_IN21K", packages=["models"])
    official = module.VisionTransformer(
        embed_dim=WIDTH, depth=DEPTH, num_classes=10, tuning_config=config,
        select_config=SimpleNamespace(open=True, keep_layers=0),
    ).double()  # fmt: skip
    copy_weights(backbone(), official.train(training), "adaptmlp", "mlp_token_select")
    losses = load(root, "models.losses", packages=["models"], stubs=["numpy.lib.arraysetops"])
    criterion = losses.AdaLoss(lambda *_: 0.0, token_minimal=0.0, token_minimal_weight=0.0)
    model, attachment = attached(f"dyt:bottleneck={BOTTLENECK},dropout=0")
    pairs: list[Pair] = []
    for i, block in enumerate(official.blocks):
        block.adaptmlp.dropout = 0.0
        block.mlp_token_select.requires_grad_(training)  # they give the gates gradients in evaluation, too
        names = {"down": "down_proj", "up": "up_proj"}
        pairs += same_names(block.adaptmlp, attachment, f"blocks.{i}.petune_dyt", names)
        pairs += same_names(block.mlp_token_select, attachment, f"blocks.{i}.petune_dyt_norm2", {"gate": "mlp_head"})
    chosen: list[Tensor] = []

    def logits(x_BCHW: Tensor) -> Tensor:
        y_BO, tokens = official(x_BCHW)
        chosen[:] = [tokens["token_select"]]
        return y_BO

    def term() -> Tensor:
        outputs = {"prediction": None, "token_select": chosen[0], "token_logits": None}
        return criterion(outputs, None)[0]

    return Built(logits, model, pairs, attachment, term=term if training else None)


def dtl(root: Path) -> Built:
    """DTL's own ViT, which averages the patches before its last norm."""
    module = load(root, "models.vision_transformer", packages=["models"], stubs=["utils", "utils.utils", REGISTRY])
    official = module.VisionTransformer(
        embed_dim=WIDTH, depth=DEPTH, num_classes=10, r=2, beta=100.0,
        lora_before_blocks=[str(i) for i in range(DEPTH)], add_after_blocks=[str(DEPTH - 1)],
    ).double().eval()  # fmt: skip
    model, attachment = attached("dtl:last=1", backbone(pool="avg"))
    state = {name.replace("fc_norm", "norm"): value for name, value in backbone(pool="avg").state_dict().items()}
    missing, unexpected = official.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert all(name.startswith("lora_") for name in missing), missing
    place = "blocks.0.petune_dtl.adapter"
    pairs = [Pair(official.lora_fusion.weight, attachment.tuned[f"{place}.conv.weight"])]
    for i in range(DEPTH):
        layer = official.lora_dict[str(i)]
        pairs.append(Pair(layer.lora_A, attachment.tuned[f"{place}.down.{i}"]))
        pairs.append(Pair(layer.lora_B, attachment.tuned[f"{place}.up.{i}"]))
    return Built(official, model, pairs, attachment)


def l2p(root: Path, *, as_it_is: bool) -> Built:
    """L2P's own ViT; as it is, it adds positions to prompts, and all images of a batch get the same prompts."""
    module = load(root, "vision_transformer", stubs=[REGISTRY])
    official = module.VisionTransformer(
        embed_dim=WIDTH, depth=DEPTH, num_classes=10, prompt_length=5, prompt_pool=True, prompt_key=True, pool_size=10,
        top_k=5, batchwise_prompt=as_it_is, head_type="prompt",
    ).double().eval()  # fmt: skip
    frozen = backbone()
    state = frozen.state_dict()
    class_token, patches = state["pos_embed"].split([1, 196], dim=1)
    torch.manual_seed(1)
    positions = 0.02 * as_it_is * torch.randn(1, 25, WIDTH, dtype=torch.float64)
    missing, _ = official.load_state_dict(
        state | {"pos_embed": torch.cat([class_token, positions, patches], 1)}, strict=False
    )
    assert set(missing) == {"prompt.prompt", "prompt.prompt_key"}, missing
    model, attachment = attached("l2p")
    tuned, place = attachment.tuned, "blocks.0.petune_l2p.adapter"
    pairs = [Pair(official.prompt.prompt, tuned[f"{place}.prompts"])]
    pairs.append(Pair(official.prompt.prompt_key, tuned[f"{place}.keys"]))
    last: dict[str, Tensor] = {}

    def logits(x_BCHW: Tensor) -> Tensor:
        with torch.no_grad():
            query_BD = frozen.forward_head(frozen.forward_features(x_BCHW), pre_logits=True)
        last.update(official(x_BCHW, cls_features=query_BD))
        return last["logits"]

    return Built(logits, model, pairs, attachment, term=lambda: -0.1 * last["reduce_sim"])


def adapter_plus(root: Path, *, theirs: str, position: str, scale: str = "none") -> Built:
    """The blocks of Adapter+, in timm's ViT; `theirs` is their name of the position."""
    module = load(root, "adapter_plus.vit_adapter", packages=["adapter_plus"])
    config = SimpleNamespace(
        config=theirs, scaling="channel" if scale == "channel" else 1.0, act_layer=True, bias=True, init="houlsby",
        norm_layer=theirs == "pfeiffer", dim=BOTTLENECK, attn_adapter=False, dropout=0.0, drop_path=0.0,
    )  # fmt: skip
    official = backbone()
    for i, block in enumerate(official.blocks):
        adapted = module.AdapterBlock(WIDTH, 12, qkv_bias=True, norm_layer=NORM, adapter_config=config).double().eval()
        copy_weights(block, adapted, "adapter")
        official.blocks[i] = adapted
    model, attachment = attached(f"pfeiffer:position={position},scale={scale},bottleneck={BOTTLENECK}")
    site = {"post": "", "pre": "_mid", "intermediate": "_mlp"}[position]
    pairs: list[Pair] = []
    for i, block in enumerate(official.blocks):
        place, names = f"blocks.{i}.petune_pfeiffer{site}", {"down": "bottleneck.1", "up": "bottleneck.4"}
        pairs += same_names(block.adapter, attachment, place, names)
        if scale == "channel":
            pairs.append(Pair(block.adapter.scaling, attachment.tuned[f"{place}.adapter.scale"]))
    return Built(official, model, pairs, attachment)


class PrefixAttention(nn.Module):
    """Calls the attention of He et al. as timm's."""

    def __init__(self, attention: Any, prefix: Any, number: int) -> None:
        super().__init__()
        self.attention, self.number = attention, number
        self.prefix = [prefix]  # no submodule: the blocks share it

    def forward(self, x_BND: Tensor, **options: Any) -> Tensor:
        """Map (B, N, D) to the same shape; there is no mask."""
        state = self.prefix[0](len(x_BND), device="cpu")[self.number]
        return self.attention(x_BND, prefix_state=state)[0]


def prefix(root: Path, *, length: int = 5) -> Built:
    """The attention of an encoder of He et al., with prefixes that are parameters themselves, in timm's ViT."""
    names = ["activations", "file_utils", "modeling_outputs", "modeling_utils", "utils"]
    stubs = [f"transformers.{name}" for name in (*names, "models.bart.configuration_bart")]
    packages = ["transformers", "transformers.models", "transformers.models.bart"]
    bart = load(
        root / "src", "transformers.models.bart.modeling_bart", stubs=[*stubs, "petl", "petl.petl_factory"],
        packages=packages, values={"transformers.utils.logging": SimpleNamespace(get_logger=lambda name: None)},
    )  # fmt: skip
    config = SimpleNamespace(
        num_hidden_layers=DEPTH, decoder_attention_heads=12, d_model=WIDTH, attn_mode="prefix", attn_option="concat",
        attn_composition="add", attn_bn=length, mid_dim=1, prefix_dropout=0.0,
    )  # fmt: skip
    learned = load(root / "petl", "petl_factory").PrefixDirectInit(config, config).double()
    official = backbone()
    for i, block in enumerate(official.blocks):
        attention = bart.BartAttention(WIDTH, 12, config=config, cache_key="encoder").double().eval()
        _copy_qkv(block.attn, attention)
        block.attn = PrefixAttention(attention, learned, i)
    model, attachment = attached(f"prefix:length={length}")
    pairs: list[Pair] = []
    for i in range(DEPTH):
        place = f"blocks.{i}.petune_prefix_attn.adapter"
        for kind, theirs in (("keys", learned.encoder_attn_key[i]), ("values", learned.encoder_attn_value[i])):
            pairs.append(Pair(theirs.weight, attachment.tuned[f"{place}.{kind}"], lambda value_PD: value_PD[None]))
    return Built(official, model, pairs, attachment)


def _copy_qkv(timms: Any, official: Any) -> None:
    """Copy timm's attention into one whose q, k and v are three layers."""
    with torch.no_grad():
        for kind in ("weight", "bias"):
            for name, part in zip("qkv", getattr(timms.qkv, kind).chunk(3), strict=True):
                getattr(getattr(official, f"{name}_proj"), kind).copy_(part)
            getattr(official.out_proj, kind).copy_(getattr(timms.proj, kind))
