"""Adapters load where a library has renamed its modules, and nowhere else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import petune
from petune.adapters.format import read_adapter
from petune.adapters.migrations import FORMAT
from petune.adapters.peft_names import renamed_options
from petune.base.errors import BackboneMismatch
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


class WithHeads(nn.Module):
    """Predicts by several heads, whose names are given."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.body = tiny()
        self.body.reset_classifier(0)
        self.names = names
        torch.manual_seed(1)
        for name in names:
            setattr(self, name, nn.Linear(24, 3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = self.body(x)
        return tuple(getattr(self, name)(features) for name in self.names)


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> Any:
        return self.model(x)


@pytest.mark.filterwarnings("ignore:the head of WithHeads is b", "ignore:the head of Wrapped is model.b")
def test_renamed_heads_and_wrapped_models_load(tmp_path: Path) -> None:
    for number, choice in enumerate((None, "b")):
        att = randomised(petune.attach(WithHeads("a", "b"), "bitfit", input_size=(3, 16, 16), head=choice))
        att.save(tmp_path / str(number))
        logits = att.model(X)
        for model in (WithHeads("one", "two"), Wrapped(WithHeads("a", "b")))[number:]:
            petune.load(model, tmp_path / str(number))
            assert all(map(torch.equal, model(X), logits))
    with pytest.raises(BackboneMismatch, match="has no heads a, b"):
        petune.load(WithHeads("one", "two", "three"), tmp_path / "0")
    petune.attach(WithHeads("a", "b", "c"), "bitfit", input_size=(3, 16, 16)).save(tmp_path / "three")
    other = WithHeads("one", "two", "three")
    with pytest.raises(BackboneMismatch, match=r"has no heads a, b, c\. If they were renamed, pass sites="):
        petune.load(other, tmp_path / "three")  # which of the last two is which?
    sites = petune.find_sites(other, (3, 16, 16), head=["one", "two", "three"])
    assert petune.load(other, tmp_path / "three", sites=sites).attached


def by_peft_alone(source: Path, target: Path, **options: Any) -> Path:
    """Copy an adapter that petune saved, without petune's part: what PEFT's `save_pretrained` writes."""
    shutil.copytree(source, target)
    file = target / "adapter_config.json"
    config = json.loads(file.read_text())
    config["auto_mapping"] = None
    file.write_text(json.dumps({**config, **options}))
    return target


def test_adapters_that_peft_alone_wrote_follow_the_renames_of_transformers(tmp_path: Path) -> None:
    golden = GOLDEN / "transformers_4" / "lora"
    expected = petune.load(transformers_vit(), golden).model(X).logits
    names = ["query", "key", "value", "dense"]
    for index, target_modules in enumerate(([f"attention.{n}" for n in names] + names, r".*(query|key|value|dense)")):
        path = by_peft_alone(golden, tmp_path / str(index), target_modules=target_modules, exclude_modules=["none"])
        att = petune.load(transformers_vit(), path)
        assert torch.equal(att.model(X).logits, expected)
    att.save(tmp_path / "again")
    assert torch.equal(petune.load(transformers_vit(), tmp_path / "again").model(X).logits, expected)


def test_options_of_single_layers_follow_the_renames() -> None:
    names = {
        "encoder.0.query": "layers.0.q_proj",
        "encoder.1.query": "layers.1.q_proj",
        "encoder.1.dense": "layers.1.fc",
    }
    options = {"type": "ia3", "target_modules": "all-linear", "feedforward_modules": ["dense"], "layers_pattern": "0"}
    patterns = {"rank_pattern": {"0.query": 3, "dense": 4, "absent": 5}, "r": 2}
    assert renamed_options({**options, **patterns}, names) == {
        "type": "ia3",
        "r": 2,
        "target_modules": ["layers.0.q_proj", "layers.1.fc", "layers.1.q_proj"],
        "feedforward_modules": ["layers.1.fc"],
        "rank_pattern": {"layers.0.q_proj": 3, "layers.1.fc": 4},
    }


def test_layers_that_the_model_does_not_have_are_named(tmp_path: Path) -> None:
    path = by_peft_alone(GOLDEN / "transformers_4" / "lora", tmp_path / "lora")
    with pytest.raises(petune.BackboneMismatch, match=r"VisionTransformer .*vit\.encoder\.layer\.0"):
        petune.load(tiny(), path)


def test_tables_that_a_library_makes_do_not_decide(tmp_path: Path) -> None:
    def with_table() -> nn.Module:
        model = tiny()
        model.blocks[0].register_buffer("table", torch.ones(3), persistent=False)
        return model

    for index, (saved_on, loaded_on) in enumerate([(tiny, with_table), (with_table, tiny)]):
        att = randomised(petune.attach(saved_on(), "full"))
        att.save(tmp_path / str(index))
        loaded = petune.load(loaded_on(), tmp_path / str(index))
        assert torch.equal(loaded.model.eval()(X), att.model.eval()(X))


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


def test_fused_and_split_qkv_are_two_backbones(tmp_path: Path) -> None:
    def eva(fused: bool) -> nn.Module:
        torch.manual_seed(0)
        sizes = {"img_size": 28, "depth": 1, "embed_dim": 24, "num_heads": 2}
        return timm.create_model("eva02_tiny_patch14_224", **sizes, qkv_fused=fused, num_classes=3).eval()

    fused, split = eva(True), eva(False).state_dict()
    names = [f"blocks.0.attn.{name}_proj.weight" for name in "qkv"]
    fused.blocks[0].attn.qkv.weight.data.copy_(torch.cat([split[name] for name in names]))
    fused.load_state_dict({key: t for key, t in split.items() if key in fused.state_dict()}, strict=False)
    same = torch.linspace(-1, 1, 3 * 28 * 28).reshape(1, 3, 28, 28)
    torch.testing.assert_close(fused(same), eva(False)(same))
    for method in ("adaptformer", "lora"):
        randomised(petune.attach(eva(False), method)).save(tmp_path / method)
        with pytest.raises(petune.BackboneMismatch, match=r"fused or split \(qkv\)"):
            petune.load(fused, tmp_path / method)


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
