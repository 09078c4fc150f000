"""The comparisons with the authors' code, and those methods of which it has only the adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fidelity_choices import gps, sct
from fidelity_models import adaptformer, convpass, fact, repadapter, ssf
from fidelity_pairs import BOTTLENECK, WIDTH, Built, Pair, attached, backbone, same_names
from fidelity_plugins import adapter_plus, dtl, dyt, l2p, mona, prefix
from official_code import load
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A comparison.

    Attributes:
        method: As on petune's command line.
        repository: `OWNER/NAME` on GitHub.
        folder: The part of it that is needed.
        of: What is compared.
        build: From the folder that the repository's part was written into.
        note: Why results differ, where they do by choice.
    """

    method: str
    repository: str
    folder: str
    of: str
    build: Callable[[Path], Built]
    note: str = ""


def bottleneck(root: Path, *, method: str, activation: str) -> Built:
    """The adapter of AdapterHub, after attention and MLP, or after the MLP only (`pfeiffer`)."""
    source = root / "src"
    packages, stubs = ["adapters", "adapters.methods"], ["adapters.utils", "adapters.context", "adapters.composition"]
    module = load(source, "adapters.methods.modeling", stubs=stubs, packages=packages)
    configs = load(source, "adapters.configuration", stubs=stubs, packages=packages)
    config = configs.DoubleSeqBnConfig(non_linearity=activation, init_weights_seed=None)
    build = _set_after(lambda: module.Adapter("task", WIDTH, BOTTLENECK, config), lambda a, y: a(y, y)[0])
    return build(method, {"down": "adapter_down.0", "up": "adapter_up"})


def noah(root: Path, *, activation: nn.Module | None) -> Built:
    """The adapter of NOAH, after the MLP; with another activation than its QuickGELU."""
    module = load(root, "model.module.adapter_super", packages=["model", "model.module"])

    def make() -> Any:
        adapter = module.AdapterSuper(WIDTH, BOTTLENECK)
        adapter.activate = activation or adapter.activate
        return adapter

    def call(adapter: Any, y: Tensor) -> Any:
        adapter.set_sample_config(BOTTLENECK)  # takes views of the weights
        return adapter(y)

    return _set_after(make, call)("pfeiffer", {"down": "ln1", "up": "ln2"})


def _set_after(make: Callable[[], Any], call: Callable[[Any, Tensor], Tensor]) -> Callable[..., Built]:
    """Return a function that puts the authors' adapters after timm's layers, as petune's method does."""

    def build(method: str, names: dict[str, str]) -> Built:
        official = backbone()
        model, attachment = attached(f"{method}:bottleneck={BOTTLENECK}")
        pairs: list[Pair] = []
        for i, block in enumerate(official.blocks):
            for site in ("attn", "mlp") if method == "houlsby" else ("mlp",):
                adapter = make().double().eval()
                getattr(block, site).register_forward_hook(lambda _, __, y, adapter=adapter: call(adapter, y))
                pairs += same_names(adapter, attachment, f"blocks.{i}.petune_{method}_{site}", names)
        return Built(official, model, pairs, attachment)

    return build


def noah_lora(root: Path) -> Built:
    """The qkv of NOAH, with its LoRA; petune's change of the other layer of the attention stays zero."""
    module = load(root, "model.module.qkv_super_prompt", packages=["model", "model.module"])
    official = backbone()
    model, attachment = attached("lora:targets=attn")
    pairs: list[Pair] = []
    for i, block in enumerate(official.blocks):
        qkv = module.qkv_super(WIDTH, 3 * WIDTH, LoRA_dim=BOTTLENECK).double()
        with torch.no_grad():  # its rows are those of q, k and v in turn
            for part, chunk in enumerate(block.attn.qkv.weight.chunk(3)):
                qkv.weight[part::3] = chunk
            qkv.bias.copy_(block.attn.qkv.bias)
        qkv.register_forward_pre_hook(lambda q, _: q.set_sample_config(WIDTH, 3 * WIDTH, BOTTLENECK))
        block.attn.qkv = qkv
        names = {kind: _only(attachment.tuned, f"blocks.{i}.attn.qkv.", f"lora_{kind}") for kind in "AB"}
        pairs.append(Pair(qkv.LoRA_a, names["A"], torch.t))
        pairs.append(Pair(qkv.LoRA_b, names["B"], lambda b_RO: torch.cat([b_RO[:, part::3] for part in range(3)], 1).T))
    return Built(official, model, pairs, attachment)


def _only(tuned: Mapping[str, nn.Parameter], start: str, part: str) -> nn.Parameter:
    (name,) = (name for name in tuned if name.startswith(start) and part in name)
    return tuned[name]


def parallel(root: Path) -> Built:
    """The parallel adapter of He et al., in a pre-norm block: it reads the residual stream before the MLP's norm."""
    module = load(root / "petl", "petl_factory")
    official = backbone()
    model, attachment = attached(f"adaptformer:bottleneck={BOTTLENECK},scale=4")
    pairs: list[Pair] = []
    for i, block in enumerate(official.blocks):
        adapter = module.Adapter_Layer(
            d_model=WIDTH,
            bottleneck=BOTTLENECK,
            adapter_scalar="4",
            adapter_layernorm_option="none",
            init_option="lora",
        )
        _beside(block, adapter.double().eval())
        names = {"down": "down_proj", "up": "up_proj"}
        pairs += same_names(adapter, attachment, f"blocks.{i}.petune_adaptformer", names)
    return Built(official, model, pairs, attachment)


def _beside(block: Any, adapter: nn.Module) -> None:
    changes: list[Tensor] = []
    block.norm2.register_forward_pre_hook(lambda _, args: changes.append(adapter(args[0], add_residual=False)))
    block.register_forward_hook(lambda _, __, out: out + changes.pop())


MONA = "Swin-Transformer-Classification/mmcls/models/backbones/swin_transformer_mona.py"

CASES = (
    Case("adaptformer", "ShoufaChen/AdaptFormer", "models", "the whole ViT", adaptformer),
    Case(
        "vpt", "ShoufaChen/AdaptFormer", "models", "the whole ViT with its prompts",
        lambda r: adaptformer(r, prompts=5),
    ),
    Case("fact", "JieShibo/PETL-ViT", "FacT", "FacT-TT on timm's ViT", lambda r: fact(r, form="tt")),
    Case("fact:form=tk", "JieShibo/PETL-ViT", "FacT", "attention only", lambda r: fact(r, form="tk", mlp=False)),
    Case(
        "fact:form=tk", "JieShibo/PETL-ViT", "FacT", "attention and MLP", lambda r: fact(r, form="tk"),
        "by choice: the authors reshape the MLP's mixed cores so that the index of the matrix and that of the column "
        "interleave; petune follows the paper's formula",
    ),
    Case("repadapter", "luogen1996/RepAdapter", "repadapter.py", "on timm's ViT", repadapter),
    Case("convpass", "JieShibo/PETL-ViT", "convpass", "with GELU in both", lambda r: convpass(r, gelu=True)),
    Case(
        "convpass", "JieShibo/PETL-ViT", "convpass", "as it is", lambda r: convpass(r, gelu=False),
        "by choice: GELU, where the authors have QuickGELU",
    ),
    Case(
        "ssf", "dongzelian/SSF", "models", "the whole ViT, its patch embedding not scaled",
        lambda r: ssf(r, patch_embedding=False),
    ),
    Case(
        "ssf", "dongzelian/SSF", "models", "the whole ViT as it is", lambda r: ssf(r, patch_embedding=True),
        "by choice: petune does not scale the patch embedding (std 0.02 here, as at the start)",
    ),
    Case(
        "houlsby", "adapter-hub/adapters", "src", "the adapter with GELU, after attention and MLP",
        lambda r: bottleneck(r, method="houlsby", activation="gelu"),
    ),
    Case(
        "houlsby", "adapter-hub/adapters", "src", "the adapter as it is",
        lambda r: bottleneck(r, method="houlsby", activation="swish"), "by choice: GELU, where AdapterHub has swish",
    ),
    Case(
        "pfeiffer", "ZhangYuanhan-AI/NOAH", "model", "the adapter with GELU, after the MLP",
        lambda r: noah(r, activation=nn.GELU()),
    ),
    Case(
        "pfeiffer", "ZhangYuanhan-AI/NOAH", "model", "the adapter as it is", lambda r: noah(r, activation=None),
        "by choice: GELU, where NOAH has QuickGELU",
    ),
    Case("lora:targets=attn", "ZhangYuanhan-AI/NOAH", "model", "LoRA of the qkv", noah_lora),
    Case("adaptformer:scale=4", "jxhe/unify-parameter-efficient-tuning", "petl", "the parallel adapter", parallel),
    Case(
        "pfeiffer:position=post,scale=channel", "visinf/adapter_plus", "adapter_plus", "Adapter+ in timm's ViT",
        lambda r: adapter_plus(r, theirs="post", position="post", scale="channel"),
    ),
    Case(
        "pfeiffer:position=pre", "visinf/adapter_plus", "adapter_plus", "`pre` in timm's ViT",
        lambda r: adapter_plus(r, theirs="pre", position="pre"),
    ),
    Case(
        "pfeiffer", "visinf/adapter_plus", "adapter_plus", "`intermediate` in timm's ViT",
        lambda r: adapter_plus(r, theirs="intermediate", position="intermediate"),
    ),
    Case(
        "pfeiffer", "visinf/adapter_plus", "adapter_plus", "what it calls `pfeiffer`",
        lambda r: adapter_plus(r, theirs="pfeiffer", position="intermediate"),
        "by choice: there the adapter reads a new LayerNorm of the residual stream after the MLP, in petune the MLP's "
        "output, as in NOAH",
    ),
    Case("mona", "Leiyi-Hu/mona", MONA, "the whole Swin of two stages", mona),
    Case(
        "dyt", "NUS-HPC-AI-Lab/Dynamic-Tuning", "models", "the whole ViT, in evaluation",
        lambda r: dyt(r, training=False),
    ),
    Case(
        "dyt", "NUS-HPC-AI-Lab/Dynamic-Tuning", "models", "the whole ViT in training, the same noise, with its loss",
        lambda r: dyt(r, training=True),
    ),
    Case("dtl", "heekhero/DTL", "models", "the whole ViT", dtl),
    Case(
        "l2p", "JH-LEE-KR/l2p-pytorch", "prompt.py vision_transformer.py",
        "the whole ViT and its loss, prompts without positions, chosen by each image", lambda r: l2p(r, as_it_is=False),
    ),
    Case(
        "l2p", "JH-LEE-KR/l2p-pytorch", "prompt.py vision_transformer.py", "the whole ViT and its loss as they are",
        lambda r: l2p(r, as_it_is=True),
        "by choice: prompts have no positions (std 0.02 here), and each image chooses its own, as in the paper",
    ),
    Case("gps", "FightingFighting/GPS", "utils", "the entries it chooses (K = 2), then the whole ViT", gps),
    Case(
        "sct", "showlab/SCT", "train_model_sct.py models", "the channels it chooses, then the whole ViT",
        lambda r: sct(r, place="attn"),
    ),
    Case(
        "sct:place=mlp", "showlab/SCT", "train_model_sct.py models", "the channels it chooses, then the whole ViT",
        lambda r: sct(r, place="mlp"),
    ),
    Case(
        "prefix", "jxhe/unify-parameter-efficient-tuning", "petl src/transformers/models/bart",
        "its attention in timm's ViT", prefix,
    ),
)  # fmt: skip
