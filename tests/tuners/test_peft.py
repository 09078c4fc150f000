"""PEFT's types as methods: the contract, files in both directions, merging, and no layers without effect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
from torch import nn

import petune
from petune.adapters.peft_format import from_peft
from petune.base.errors import AttachError, BackboneMismatch, ConfigError
from petune.injector.registry import build_tuner
from petune.plugin_dev.tiny_models import tiny_timm, tiny_torchvision
from petune.tuners.peft_bridge.options import REFUSED, peft_types
from tests.peft_models import X, logits, model, randomized
from tests.sampling import sampled
from tests.tiny import tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT and its dependencies warn of much


TYPES = sorted(peft_types())


CONTRACT = {"lora", "oft", "vblora"}
"""Types that `make test` takes through the whole contract; `make test-all` takes all."""


def test_the_well_known_types_are_supported() -> None:
    well_known = (
        "lora ia3 oft boft hra loha lokr vera fourierft ln_tuning randlora c3a miss shira waveft delora gralora road"
    )
    assert {*well_known.split(), "adalora", "vblora"} <= set(TYPES)
    assert len(TYPES) >= 25


@pytest.mark.exhaustive
def test_the_docs_list_every_type() -> None:
    from peft_types import PAGE, rows, updated

    page = PAGE.read_text(encoding="utf-8")
    if f"PEFT {peft.__version__} has" in page:
        assert updated(page) == page, "run python benchmarks/peft_types.py"
    states = {kind: state for kind, state, *_ in rows()}
    assert set(states) == {*TYPES, *REFUSED} - {"petune"} == {m.value.lower() for m in peft.PeftType} - {"petune"}


@pytest.mark.parametrize("kind", sampled(TYPES, CONTRACT.__contains__))
def test_every_type_meets_the_contract(kind: str) -> None:
    assert petune.check_tuner(f"peft:{kind}", model())


@pytest.mark.parametrize("kind", sampled(TYPES, CONTRACT.__contains__))
def test_saved_adapters_load_with_peft(kind: str, tmp_path: Path) -> None:
    att = randomized(petune.attach(model(), f"peft:{kind}"))
    att.save(tmp_path / "a", metadata={"classes": ["a", "b", "c"]})
    fresh = model()
    nn.init.zeros_(fresh.head.weight)  # a new head, as before the training
    theirs = peft.PeftModel.from_pretrained(fresh, str(tmp_path / "a"))
    assert torch.equal(logits(theirs), logits(att.model))


@pytest.mark.parametrize("kind", sampled(TYPES, CONTRACT.__contains__))
def test_adapters_saved_by_peft_load_here(kind: str, tmp_path: Path) -> None:
    ours = petune.attach(model(), f"peft:{kind}").tuner.wrapped.config
    skipped = {"peft_type", "runtime_config", "inference_mode"}
    config = type(ours)(**{k: v for k, v in ours.to_dict().items() if k not in skipped})
    config.modules_to_save = ["head"]
    theirs = peft.get_peft_model(model(), config)
    torch.manual_seed(3)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.05)
    assert not torch.allclose(logits(theirs), logits(model()))
    theirs.save_pretrained(tmp_path / "b")
    att = petune.load(model(), tmp_path / "b")
    assert torch.equal(logits(att.model), logits(theirs))
    att.save(tmp_path / "c")
    assert torch.equal(logits(petune.load(model(), tmp_path / "c").model), logits(theirs))


def test_empty_options_of_a_file_of_peft_are_kept_where_the_default_is_another() -> None:
    config = {"peft_type": "IA3", "target_modules": ["qkv"], "feedforward_modules": [], "exclude_modules": None}
    assert from_peft(config)["config"] == {"type": "ia3", "target_modules": ["qkv"], "feedforward_modules": []}
    options = from_peft({"peft_type": "LORA", "target_modules": ["qkv"], "rank_pattern": {}, "r": 8})["config"]
    assert options == {"type": "lora", "target_modules": ["qkv"]}


def test_files_of_old_versions_of_peft_are_loaded_with_its_own_warning_or_refused() -> None:
    """PEFT changed the last term of OFT's Cayley series in 0.18, and the layout of OFT's file in 0.14."""
    old = {"peft_type": "OFT", "oft_block_size": 4, "use_cayley_neumann": True, "r": 0}
    with pytest.warns(UserWarning, match="PEFT 0"):
        assert from_peft(old)["config"]["type"] == "oft"
    with pytest.raises(petune.CheckpointError, match="PEFT 0"):
        from_peft({"peft_type": "OFT", "r": 8})


@pytest.mark.parametrize("kind", sampled(TYPES, CONTRACT.__contains__))
def test_merged_models_compute_the_same(kind: str) -> None:
    att = randomized(petune.attach(model(), f"peft:{kind}"))
    before = logits(att.model)
    att.merge()
    torch.testing.assert_close(logits(att.model), before, atol=1e-5 * float(before.abs().max()), rtol=0)
    assert list(att.model.state_dict()) == list(model().state_dict())


def test_options_may_follow_the_type_after_a_comma() -> None:
    spelled = [
        petune.attach(model(), name) for name in ("peft:loha,module_dropout=0.5", "peft:loha:module_dropout=0.5")
    ]
    assert {att.tuner.wrapped.config.module_dropout for att in spelled} == {0.5}
    with pytest.raises(ConfigError, match="vpt:deep=VALUE"):
        petune.attach(model(), "vpt:deep,num_prompts=4")


def test_lora_equals_the_formula() -> None:
    att = randomized(petune.attach(model(), "lora", r=3, lora_alpha=6, targets="attn"))
    layer = att.model.blocks[1].attn.qkv
    x = torch.randn(2, 5, 32)
    a, b = (getattr(layer, f"lora_{f}")["petune_lora"].weight for f in "AB")
    by_hand = nn.functional.linear(x, layer.base_layer.weight + 2 * b @ a, layer.base_layer.bias)
    torch.testing.assert_close(layer(x), by_hand, atol=1e-5, rtol=1e-5)
    assert att.counts.tuned == 2 * 3 * ((32 + 96) + (32 + 32))


@pytest.mark.parametrize("name", sampled(["beit_base_patch16_224", "eva02_tiny_patch14_224"], lambda n: "eva" in n))
def test_attentions_that_read_their_weights_call_the_layer(name: str) -> None:
    size: dict[str, Any] = {"img_size": 28, "patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 2}
    built = timm.create_model(name, num_classes=3, **size)
    torch.manual_seed(0)
    for p in built.parameters():
        nn.init.normal_(p, mean=0.1, std=0.1)
    assert petune.check_tuner("lora", built, targets="attn")
    assert any(
        key.endswith("qkv.lora_A.petune_lora.weight") for key in petune.attach(built, "lora", targets="attn").tuned
    )


def test_layers_that_cannot_be_called_are_named() -> None:
    with pytest.raises(AttachError, match="reads the weights of"):
        petune.attach(tiny_torchvision(), "dora", targets="attn")
    with pytest.warns(UserWarning, match="without calling them"):
        att = petune.attach(tiny_torchvision(), "dora")
    assert not any("out_proj" in key or "in_proj" in key for key in att.tuned)


def test_lora_changes_the_fused_weight_of_torch_attention(tmp_path: Path) -> None:
    assert petune.check_tuner("lora", tiny_torchvision(), targets="attn")
    att = randomized(petune.attach(tiny_torchvision(), "lora", targets="attn", r=2))
    assert att.counts.tuned == 2 * 2 * (24 + 72)
    att.save(tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(tiny_torchvision(), str(tmp_path / "a"))
    before = logits(att.model)
    assert torch.equal(logits(theirs), before)
    plain = list(tiny_torchvision().state_dict())
    att.merge()
    torch.testing.assert_close(logits(att.model), before, atol=1e-5, rtol=1e-5)
    assert list(att.model.state_dict()) == plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "lora", "rank": 4}, r"no such option of lora: rank. Did you mean r\?"),
        ({"type": "lora", "alpha": 4}, r"alpha. Did you mean lora_alpha\?"),
        ({"type": "lora", "target": "attn"}, r"target. Did you mean .*targets"),
        ({"type": "nonsense"}, r"^no such PEFT type for vision models: nonsense. Known: adalora, adamss"),
        ({"type": "fourier"}, r"^no such PEFT type for vision models: fourier. Did you mean fourierft\?$"),
        ({}, "peft needs a type: peft:TYPE. Known: adalora, adamss, beft"),
        ({"type": "oft", "module_dropout": 0.1}, "PEFT never applies it"),
        ({"type": "loha", "module_dropout": 1.0}, "module_dropout is 1"),
        ({"type": "supertuning", "lora_dropout": 0.1}, "Set r too"),
        ({"type": "hra", "apply_GS": True, "r": 4}, "init_weights=false"),
        ({"type": "lora", "alora_invocation_tokens": [1]}, "would do nothing"),
        ({"type": "lora", "trainable_token_indices": [1]}, "word embeddings"),
        ({"type": "pvera", "sample_at_inference": True}, "would be random in eval mode"),
        ({"type": "lora", "init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"type": "lora", "bias": "all"}, "attach bitfit as well"),
        ({"type": "vblora", "save_only_topk_weights": True}, "save_only_topk_weights"),
        ({"type": "lora", "modules_to_save": ["norm"]}, "the classifier trains anyway"),
        ({"type": "lora", "layers_to_transform": [0]}, "together with target_modules"),
        ({"type": "lora", "targets": "attn", "target_modules": ["fc1"]}, "targets=attn and target_modules both choose"),
        ({"type": "lora", "task_type": "SEQ_CLS"}, "classify images"),
        ({"type": "oft", "r": 4, "oft_block_size": 8}, "refused by PEFT's OFTConfig: You can only"),
        *(({"type": kind}, REFUSED[kind][:30]) for kind in REFUSED),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        petune.attach(model(), "peft", **options)


def test_a_second_type_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"peft:ia3 already has the type ia3, but type=lora is given too"):
        build_tuner("peft:ia3,type=lora")
    assert build_tuner("lora:targets=all,target_modules=[fc1]").config.targets == "all"  # as saved configs have it


@pytest.mark.parametrize(
    ("kind", "options"),
    [("oft", {"r": 4}), ("oft", {"oft_block_size": 8}), ("lora", {"use_rslora": True}), ("adalora", {"tinit": 2}),
     ("lora", {"target_modules": ["qkv"], "layers_to_transform": [0], "layers_pattern": "blocks"})],
)  # fmt: skip
def test_options_are_passed_to_peft(kind: str, options: dict[str, Any]) -> None:
    att = petune.attach(model(), f"peft:{kind}", **options)
    assert all(
        getattr(att.tuner.wrapped.config, k) in (v, {*v} if isinstance(v, list) else v) for k, v in options.items()
    )
    assert len(att.tuner.wrapped.layers) == (1 if "layers_pattern" in options else 8)


def test_a_refused_attach_leaves_the_model_unchanged() -> None:
    built = model()
    before = [name for name, _ in built.named_modules()]
    with pytest.raises(AttachError, match="PEFT cannot put miss"):
        petune.attach(built, "peft:miss", r=1000)
    assert [name for name, _ in built.named_modules()] == before
    assert not hasattr(built, "peft_config")


def test_a_plain_checkpoint_still_loads_under_lora() -> None:
    built, other = model(), tiny_timm(embed_dim=32, num_classes=3)
    for p in other.parameters():
        nn.init.normal_(p)
    petune.attach(built, "lora")
    report = built.load_state_dict(other.state_dict(), strict=False)
    assert report.unexpected_keys == []
    assert all("lora" in key for key in report.missing_keys)
    assert torch.equal(logits(built), logits(other))


def test_another_backbone_is_refused(tmp_path: Path) -> None:
    petune.attach(model(), "lora").save(tmp_path / "a")
    other = model()
    nn.init.normal_(other.blocks[0].attn.qkv.weight)
    with pytest.raises(BackboneMismatch, match="other weights"):
        petune.load(other, tmp_path / "a")
    with pytest.raises(BackboneMismatch, match="number of classes"):
        petune.load(with_classes(5), tmp_path / "a")


def with_classes(count: int) -> nn.Module:
    built = model()
    built.head = nn.Linear(32, count)
    return built


def test_ln_tuning_refuses_models_without_layer_norm() -> None:
    model = timm.create_model("test_vit4", num_classes=3)
    with pytest.raises(petune.AttachError, match=r"needs torch.s LayerNorm, but VisionTransformer has others"):
        petune.attach(model, "peft", type="ln_tuning")


def test_ln_tuning_skips_norms_without_weight() -> None:
    model = tiny_timm()
    model.norm = nn.LayerNorm(model.embed_dim, elementwise_affine=False)
    att = petune.attach(model, "peft", type="ln_tuning")
    assert att.counts.tuned == len(att.sites.blocks) * 2 * 2 * model.embed_dim


@pytest.mark.parametrize("targets", [["qkv", "head"], "all-linear"])
def test_the_classifier_is_never_a_target(targets: Any) -> None:
    with pytest.raises(AttachError, match=r"target_modules includes .*head, a layer of the classifier"):
        petune.attach(tiny(), "lora", target_modules=targets)


def test_tensors_that_peft_leaves_out_are_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    att = petune.attach(model(), "lora")
    monkeypatch.setattr(peft, "get_peft_model_state_dict", lambda *args, **kwargs: {})
    with pytest.raises(AttachError, match="does not save 16 of the 16 tensors"):
        att.save(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_adalora_skips_the_fused_weight_of_torch_attention() -> None:
    with pytest.raises(AttachError, match="adalora needs linear layers that are called"):
        petune.attach(tiny_torchvision(), "peft:adalora", targets="attn")
    with pytest.warns(UserWarning, match="without calling them"):
        att = petune.attach(tiny_torchvision(), "peft:adalora")
    att.model.train()(X).sum().backward()
    att.check_gradients()


def test_constants_of_a_type_do_not_count_as_backbone(tmp_path: Path) -> None:
    built = model()
    below = randomized(petune.attach(built, "adaptformer"))
    petune.attach(built, "peft:boft")
    below.save(tmp_path / "a")
    assert petune.load(model(), tmp_path / "a").attached


def test_a_set_of_layers_is_saved_in_a_fixed_order(tmp_path: Path) -> None:
    names = {"qkv", "proj", "fc1", "fc2"}
    petune.attach(model(), "lora", target_modules=names).save(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["auto_mapping"]["petune"]["config"][
        "target_modules"
    ] == sorted(names)
    assert petune.load(model(), tmp_path / "a", tuner=build_tuner("lora", target_modules=names)).attached


@pytest.mark.parametrize(("rank", "is_identity"), [(3, False), (4, True)])
def test_hra_is_the_identity_at_even_ranks(rank: int, is_identity: bool) -> None:
    built = model()
    plain = logits(built)
    att = petune.attach(built, "peft:hra", r=rank)
    assert att.tuner.identity_at_init == is_identity
    assert torch.allclose(logits(built), plain, atol=1e-5) == is_identity


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA, PEFT may build its extension")
def test_boft_is_refused_where_peft_would_train_fewer_factors() -> None:
    built = model()
    before = dict(built.named_modules())
    with pytest.raises(AttachError, match="boft_n_butterfly_factor=2 needs PEFT's CUDA extension"):
        petune.attach(built, "peft:boft", boft_n_butterfly_factor=2)
    assert dict(built.named_modules()) == before


def test_pvera_learns_the_variance_that_it_samples_with() -> None:
    att = randomized(petune.attach(model(), "peft:pvera", r=8))
    att.model.train()(X).square().sum().backward()
    variances = [p.grad[8:] for key, p in att.tuned.items() if "lambda_d" in key]
    assert len(variances) == 8
    assert all(bool(grad.all()) for grad in variances)


BFLOAT16 = ["lora", "dora", "peft:oft", "peft:vera"]


@pytest.mark.parametrize(
    "method",
    [
        m if m in BFLOAT16 else pytest.param(m, marks=pytest.mark.exhaustive)
        for m in (*(f"peft:{kind}" for kind in TYPES), "lora", "dora")
    ],
)
def test_files_of_a_bfloat16_model_are_exchanged_with_peft(method: str, tmp_path: Path) -> None:
    def half() -> nn.Module:
        return model().bfloat16()

    x = X.bfloat16()
    att = petune.attach(half(), method)
    config = att.tuner.wrapped.config
    randomized(att).save(tmp_path / "ours")
    with torch.no_grad():
        ours = att.model.eval()(x)
        theirs = peft.PeftModel.from_pretrained(half(), str(tmp_path / "ours"))
        assert torch.equal(theirs.eval()(x), ours)
        in_peft = peft.get_peft_model_state_dict(theirs)
    assert {key: t.dtype for key, t in in_peft.items()} == {key: t.dtype for key, t in att.file_state().items()}
    skipped = {"peft_type", "runtime_config", "inference_mode", "auto_mapping"}
    config = type(config)(**{k: v for k, v in config.to_dict().items() if k not in skipped})
    config.modules_to_save = ["head"]
    trained = peft.get_peft_model(half(), config)
    torch.manual_seed(3)
    with torch.no_grad():
        for key, p in trained.named_parameters():
            if p.requires_grad and "ranknum" not in key:  # AdaLoRA's number of ranks is no weight
                p.add_(torch.randn_like(p), alpha=0.05)
        trained.save_pretrained(tmp_path / "theirs")
        assert torch.equal(petune.load(half(), tmp_path / "theirs").model.eval()(x), trained.eval()(x))


class InlineAttention(nn.Module):
    """A block whose attention is in its own forward; its MLP is a module."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm2, self.mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x_BND)).unsqueeze(1).chunk(3, -1)
        x_BND = x_BND + self.out(nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x_BND + self.mlp(self.norm2(x_BND))


def test_an_attention_inside_the_forward_of_its_block_is_wrapped() -> None:
    blocks = [InlineAttention() for _ in range(2)]
    whole = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Flatten(2), Tokens(), *blocks, nn.Flatten(1), nn.Linear(128, 3))
    att = petune.attach(whole, "lora", input_size=(3, 32, 32), r=2)
    assert "attn" not in att.sites.blocks[0].parts
    assert sum(p.numel() for p in att.tuned.values()) == 2 * 2 * (8 + 24 + 8 + 8 + 2 * (8 + 16))


class Tokens(nn.Module):
    def forward(self, x_BDN: torch.Tensor) -> torch.Tensor:
        return x_BDN.mT
