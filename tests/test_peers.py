"""What README says about PEFT and timm, checked with the versions it names."""

from __future__ import annotations

import re
import warnings
from importlib.metadata import version
from pathlib import Path

import peft
import pytest
import timm
import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model

from petune.tuners.peft_bridge.options import peft_types

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
NAMED = re.search(r"checked with PEFT ([\d.]+\d) and timm ([\d.]+\d)", README)
SHAPE = {"img_size": 32, "patch_size": 4, "depth": 2, "num_classes": 10}

pytestmark = pytest.mark.skipif(
    NAMED is not None and NAMED.groups() != (version("peft"), version("timm")), reason="README names other versions"
)


@pytest.fixture(autouse=True)
def no_warnings() -> None:
    warnings.simplefilter("error")


def small_vit() -> torch.nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **SHAPE)


def test_readme_names_the_versions() -> None:
    assert NAMED is not None


def test_numbers_of_types_and_architectures() -> None:
    own = [kind for kind in PeftType if kind.value != "PETUNE"]
    assert f"yes, {len(own)} types" in README
    assert f"[{len(peft_types())} types]" in README
    assert f"{len(timm.list_models()):,} architectures" in README


def test_peft_needs_names_and_all_linear_includes_the_classifier() -> None:
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(small_vit(), LoraConfig())
    model = get_peft_model(small_vit(), LoraConfig(target_modules="all-linear"))
    assert any("head.lora_" in name for name, _ in model.named_parameters())


def test_peft_silently_trains_nothing_at_the_qkv_layer_of_beit() -> None:
    shape = {**SHAPE, "patch_size": 8, "embed_dim": 48, "num_heads": 4, "depth": 1}
    model = timm.create_model("beit_base_patch16_224", **shape)
    tuned = get_peft_model(model, LoraConfig(target_modules=["qkv"], modules_to_save=["head"]))
    tuned(torch.randn(2, 3, 32, 32)).sum().backward()
    gradients = [p.grad for name, p in tuned.named_parameters() if "lora_" in name]
    assert gradients == [None, None]


def test_peft_loads_onto_other_weights_without_a_warning(tmp_path: Path) -> None:
    get_peft_model(small_vit(), LoraConfig(target_modules=["qkv"])).save_pretrained(tmp_path)
    assert isinstance(PeftModel.from_pretrained(small_vit(), tmp_path), PeftModel)


def test_peft_mixes_adapters_of_three_types_in_a_batch() -> None:
    tuners = Path(peft.__file__).parent / "tuners"
    mixing = [p.parent.name for p in tuners.glob("*/layer.py") if "_mixed_batch_forward" in p.read_text()]
    assert sorted(mixing) == ["glora", "lora", "road"]


def test_timm_has_no_adapters_or_prompts() -> None:
    names = [name.lower() for name in dir(timm.layers)]
    assert [name for name in names if "lora" in name or "adapter" in name or "prompt" in name] == []
