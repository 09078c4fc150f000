"""Adapters and exports of an `hf:` backbone have the keys of transformers' own model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import petune
from petune.backbones.create import create_backbone
from petune.base.files import write_manifest
from petune.serving.restore import restore
from tests.sampling import sampled
from tests.tiny import randomised

GOLDEN = Path(__file__).parents[1] / "golden" / "hf"
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT reads it

METHODS = ("adaptformer", "lora", "partial")
KEPT = {("vit", "lora"), ("clip", "adaptformer")}
X = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the backbones `vit`, which has a classifier, and `clip`, which has none."""
    for name in ("vit", "clip"):
        shutil.copytree(GOLDEN / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def metadata(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{name}_adaptformer" / "adapter_config.json").read_text())["metadata"]  # type: ignore[no-any-return]


def transformers_vit() -> nn.Module:
    from transformers import AutoModelForImageClassification

    model: nn.Module = AutoModelForImageClassification.from_pretrained(
        "vit", num_labels=3, ignore_mismatched_sizes=True
    )
    return model


def saved_adapter(method: str, backbone: str = "vit") -> Tensor:
    """Save an adapter of petune's backbone as `adapter` and return its logits."""
    attachment = randomised(petune.attach(create_backbone(f"hf:{backbone}", num_classes=3).model, method))
    attachment.save("adapter", metadata=metadata(backbone))
    with torch.no_grad():
        logits: Tensor = attachment.model.eval()(X)
    return logits


@pytest.mark.parametrize("method", sampled(METHODS, "lora".__eq__))
def test_an_adapter_fits_the_model_of_transformers(method: str) -> None:
    expected = saved_adapter(method)
    model = transformers_vit()
    petune.load(model, "adapter")
    assert torch.equal(model.eval()(X).logits, expected)


def test_peft_alone_loads_an_adapter_of_its_type() -> None:
    from peft import PeftModel

    expected = saved_adapter("lora")
    model = PeftModel.from_pretrained(transformers_vit(), "adapter")
    torch.testing.assert_close(model.eval()(X).logits, expected)


def test_the_target_modules_are_those_of_transformers() -> None:
    saved_adapter("lora")
    modules = dict(transformers_vit().named_modules())
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    assert set(config["target_modules"]) <= modules.keys()
    assert config["modules_to_save"] == ["classifier"]


@pytest.mark.parametrize("method", sampled(["lora", "adaptformer"], "adaptformer".__eq__))
def test_the_examples_of_the_card_run(method: str) -> None:
    expected = saved_adapter(method)
    code = re.findall(r"^```python\n(.*?)^```", Path("adapter/README.md").read_text(), flags=re.M | re.S)
    build, with_petune, with_peft = code[-3:]
    assert "ViTForImageClassification" in build
    for load, loaded in ((with_petune, "model"), (with_peft, "tuned")):
        names: dict[str, Any] = {}
        exec(build, names)
        exec(load, names)
        torch.testing.assert_close(names[loaded].eval()(X).logits, expected)


def test_an_exported_file_fits_the_model_of_transformers() -> None:
    expected = saved_adapter("lora")
    petune.export("adapter", "merged.safetensors")
    model = transformers_vit()
    model.load_state_dict(load_file("merged.safetensors"))
    torch.testing.assert_close(model.eval()(X).logits, expected)
    shutil.copy("merged.safetensors", "vit/model.safetensors")
    torch.testing.assert_close(transformers_vit().eval()(X).logits, expected)


def test_a_model_without_a_classifier_keeps_its_keys() -> None:
    saved_adapter("lora", "clip")
    keys = {key.removeprefix("base_model.model.") for key in load_file("adapter/adapter_model.safetensors")}
    assert {key for key in keys if key.startswith("classifier.")} == {"classifier.weight", "classifier.bias"}
    assert all(key.startswith(("encoder.layers.", "classifier.")) for key in keys)


@pytest.mark.parametrize(
    ("backbone", "method"),
    sampled([*(("vit", method) for method in METHODS), ("clip", "adaptformer"), ("clip", "lora")], KEPT.__contains__),
)
def test_adapters_with_the_keys_of_petunes_old_wrapper_load(backbone: str, method: str) -> None:
    path = GOLDEN / f"{backbone}_{method}"
    restored = restore(path)
    with torch.no_grad():
        logits = restored.backbone.model.eval()(X)
    torch.testing.assert_close(logits, torch.tensor(restored.metadata["logits"]), atol=1e-5, rtol=1e-5)
    restored.attachment.save("again", metadata=restored.metadata)
    model = create_backbone(f"hf:{backbone}", num_classes=3).model
    petune.load(model, "again")
    assert torch.equal(model.eval()(X), logits)


def test_a_file_that_lost_the_final_norm_is_refused() -> None:
    """It loads only if the norm was frozen when it was saved, as in development versions."""
    saved_adapter("partial")
    file = Path("adapter/adapter_model.safetensors")
    save_file({key: t for key, t in load_file(file).items() if "vit.layernorm." not in key}, file)
    write_manifest(Path("adapter"), ["adapter_config.json", file.name])
    with pytest.raises(petune.BackboneMismatch, match="other weights"):
        petune.load(transformers_vit(), "adapter")


def test_an_old_adapter_is_still_refused_on_other_weights() -> None:
    model = create_backbone("hf:vit", num_classes=3).model
    with torch.no_grad():
        next(iter(model.parameters())).add_(0.1)
    with pytest.raises(petune.BackboneMismatch, match="other weights"):
        petune.load(model, GOLDEN / "vit_lora")


@pytest.mark.parametrize("wrapper", ["", "model."])
def test_a_weights_file_with_transformers_keys_or_those_of_the_old_wrapper_loads(wrapper: str) -> None:
    tensors = transformers_vit().state_dict()
    info = {"petune": json.dumps({"backbone": "hf:vit"})} if wrapper else {}
    save_file({wrapper + key: tensor for key, tensor in tensors.items()}, "file.safetensors", metadata=info)
    state = create_backbone("hf:vit", weights="file.safetensors", num_classes=3).model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in tensors.items() if "classifier" not in key)


def test_a_bank_takes_old_and_new_adapters() -> None:
    expected = saved_adapter("lora")
    bank = petune.AdapterBank(create_backbone("hf:vit", num_classes=3).model)
    bank.load("new", "adapter")
    bank.load("old", GOLDEN / "vit_adaptformer")
    torch.testing.assert_close(torch.stack(bank(X, ["new", "new"])), expected)
    old = torch.tensor(metadata("vit")["logits"])
    torch.testing.assert_close(torch.stack(bank(X, ["old", "old"])), old, atol=1e-5, rtol=1e-5)
