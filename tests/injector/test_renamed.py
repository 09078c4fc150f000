"""Adapters load where a library has renamed its modules, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import petune
from petune.adapters.format import read_adapter
from petune.adapters.migrations import FORMAT
from tests.tiny import X, randomised, tiny

GOLDEN = Path(__file__).parents[1] / "golden"
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT reads it


def transformers_vit() -> nn.Module:
    """The model that the golden adapters were saved on, by transformers 4.57: `vit.encoder.layer.0.attention…`."""
    from transformers import AutoModelForImageClassification

    model: nn.Module = AutoModelForImageClassification.from_pretrained(
        GOLDEN / "hf" / "vit", num_labels=3, ignore_mismatched_sizes=True
    )
    return model.eval()


def test_adapters_that_were_saved_under_transformers_4_compute_the_same(tmp_path: Path) -> None:
    for path in sorted((GOLDEN / "transformers_4").iterdir()):
        saved = read_adapter(path)
        att = petune.load(transformers_vit(), path)  # compares the logits
        assert saved.tensors.keys() != att.file_state().keys(), path
        assert saved.config["reference_logits"] is not None
        assert saved.config["fingerprint"] == att.fingerprint()
        logits = att.model(X).logits
        att.save(tmp_path / path.name)
        again = petune.load(transformers_vit(), tmp_path / path.name)
        assert torch.equal(again.model(X).logits, logits)


def test_other_weights_under_other_names_are_refused() -> None:
    for name in ("adaptformer", "lora", "full"):
        model = transformers_vit()
        with torch.no_grad():
            model.get_submodule("vit.layers.1.attention.q_proj").weight.mul_(1.1)
        before = {key: t.clone() for key, t in model.state_dict().items()}
        with pytest.raises(petune.BackboneMismatch, match="other weights"):
            petune.load(model, GOLDEN / "transformers_4" / name)
        assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_an_adapter_of_format_3_loads() -> None:
    saved = read_adapter(GOLDEN / "v3" / "adaptformer")
    assert saved.config["format"] == FORMAT
    assert saved.config["fingerprint"] is None
    petune.load(transformers_vit(), GOLDEN / "v3" / "adaptformer")
    model = transformers_vit()
    with torch.no_grad():
        model.get_submodule("vit.layers.1.layernorm_after").weight[0] += 1e-3
    with pytest.raises(petune.BackboneMismatch, match="other weights"):
        petune.load(model, GOLDEN / "v3" / "adaptformer")


def renamed(model: nn.Module) -> nn.Module:
    """The tiny ViT with other names, registered in another order."""
    for block in model.blocks:
        for old, new in (("mlp", "feed_forward"), ("attn", "attention"), ("norm1", "first"), ("norm2", "second")):
            block._modules[new] = block._modules.pop(old)

        def forward(x: torch.Tensor, own: Any = block) -> torch.Tensor:
            x = x + own.attention(own.first(x))
            out: torch.Tensor = x + own.feed_forward(own.second(x))
            return out

        block.forward = forward
    return model


def test_every_kind_of_tensor_is_found_under_other_names(tmp_path: Path) -> None:
    for method in ("houlsby", "vpt", "lst", "bitfit", "norm", "partial", "dora"):
        att = randomised(petune.attach(tiny(), method))
        att.save(tmp_path / method)
        loaded = petune.load(renamed(tiny()), tmp_path / method)
        torch.testing.assert_close(loaded.model.eval()(X), att.model.eval()(X), msg=method)


def test_the_fingerprint_sees_the_order_of_blocks_and_no_names() -> None:
    expected = petune.attach(tiny(), "adaptformer").fingerprint()
    assert petune.attach(renamed(tiny()), "adaptformer").fingerprint() == expected
    model = tiny()
    copies = [{key: t.clone() for key, t in block.state_dict().items()} for block in model.blocks]
    for block, copy in zip(model.blocks, [copies[1], copies[0], *copies[2:]], strict=True):
        block.load_state_dict(copy)
    assert petune.attach(model, "adaptformer").fingerprint() != expected
