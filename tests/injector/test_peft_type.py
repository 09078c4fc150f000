"""petune's tuners as a PEFT type: what petune saved loads with PEFT, bit for bit, and the other way round."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import petune
from petune.base.errors import AttachError, BackboneMismatch, ConfigError, NotMergeable, UsageError
from petune.injector.peft_type import PetuneConfig
from petune.plugin_dev.tiny_models import tiny_models
from tests.sampling import sampled
from tests.tiny import X, tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT asks for it
]
petune.register_with_peft()
NAMES = [t.name for t in petune.list_tuners() if t.name not in {"peft", "lora", "dora"}]
PAIRS = [
    *(("timm", name) for name in NAMES),
    *((library, name) for library in [*tiny_models()][1:] for name in ("adaptformer", "vpt", "bitfit", "convpass")),
]
SAMPLE = {
    *(("timm", name) for name in ("adaptformer", "vpt", "ssf", "fact", "full")),
    ("torchvision", "bitfit"),
    ("transformers", "convpass"),
}


@torch.no_grad()
def logits(of: nn.Module, x: Tensor = X) -> Tensor:
    out = of.eval()(x)
    return getattr(out, "logits", out)


def trained(name: str, model: nn.Module, seed: int = 2, **options: Any) -> petune.Attachment:
    torch.manual_seed(seed)
    att = petune.attach(model, name, **options)
    with torch.no_grad():
        for p in att.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return att


@pytest.mark.parametrize(("library", "name"), sampled(PAIRS, lambda pair: pair in SAMPLE))
def test_saved_by_petune_loaded_by_peft_saved_by_peft_loaded_by_petune(name: str, library: str, tmp_path: Path) -> None:
    build = tiny_models()[library]
    plain = build()
    try:
        att = trained(name, build())
    except AttachError as refused:
        pytest.skip(str(refused))
    att.save(tmp_path / "a", metadata={"classes": ["x", "y", "z"]})
    theirs = peft.PeftModel.from_pretrained(build(), str(tmp_path / "a"))
    expected = logits(att.model)
    assert torch.equal(logits(theirs), expected)
    assert not torch.equal(expected, logits(plain))
    assert not any(p.requires_grad for p in theirs.base_model.attachments["default"].parameters())
    with theirs.disable_adapter():
        assert torch.equal(logits(theirs), logits(plain))
    theirs.save_pretrained(tmp_path / "b")
    again = petune.load(build(), tmp_path / "b")
    assert torch.equal(logits(again.model), expected)
    assert torch.equal(logits(theirs.unload()), logits(plain))


def test_created_and_trained_with_peft(tmp_path: Path) -> None:
    built = peft.get_peft_model(tiny(), PetuneConfig(tuner="adaptformer", config={"bottleneck": 3}))
    trainable, total = built.get_nb_trainable_parameters()
    assert trainable == petune.attach(tiny(), "adaptformer", bottleneck=3).counts.tuned + 24 * 5 + 5
    assert total > trainable
    optimizer = torch.optim.SGD([p for p in built.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(built.train()(X), torch.tensor([1, 2])).backward()
        optimizer.step()
    built.save_pretrained(tmp_path / "a")
    loaded = petune.load(tiny(), tmp_path / "a")
    assert torch.equal(logits(loaded.model), logits(built))
    assert loaded.tuner.config.model_dump()["bottleneck"] == 3
    resumed = peft.PeftModel.from_pretrained(tiny(), str(tmp_path / "a"), is_trainable=True)
    assert resumed.get_nb_trainable_parameters() == (trainable, total)
    assert isinstance(peft.PeftConfig.from_pretrained(str(tmp_path / "a")), PetuneConfig)


def test_several_adapters_take_turns(tmp_path: Path) -> None:
    expected = {}
    for number, name in enumerate(["adaptformer", "vpt", "bitfit"]):
        att = trained(name, tiny(), seed=number)
        att.save(tmp_path / name)
        expected[name] = logits(att.model)
    model = peft.PeftModel.from_pretrained(tiny(), str(tmp_path / "adaptformer"), "adaptformer")
    for name in ("vpt", "bitfit"):
        model.load_adapter(str(tmp_path / name), name)
        assert torch.equal(logits(model), expected["adaptformer"])  # loading one more does not switch
    for name in ("bitfit", "vpt", "adaptformer", "bitfit"):
        model.set_adapter(name)
        assert torch.equal(logits(model), expected[name])
        held = {id(p) for p in model.base_model.attachments[name].parameters()}
        assert {id(p) for p in model.parameters() if p.requires_grad} == held
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny()))
    model.delete_adapter("bitfit")
    assert torch.equal(logits(model), expected["adaptformer"])
    model.save_pretrained(tmp_path / "all")
    for name in ("adaptformer", "vpt"):
        assert torch.equal(logits(petune.load(tiny(), tmp_path / "all" / name).model), expected[name])
    back = model.unload()
    assert torch.equal(logits(back), logits(tiny()))
    assert list(back.state_dict()) == list(tiny().state_dict())
    assert not hasattr(back, "peft_config")


def test_merged(tmp_path: Path) -> None:
    att = trained("repadapter", tiny())
    att.save(tmp_path / "a")
    merged = peft.PeftModel.from_pretrained(tiny(), str(tmp_path / "a")).merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(att.model), atol=1e-5, rtol=1e-5)
    assert list(merged.state_dict()) == list(tiny().state_dict())
    trained("vpt", tiny()).save(tmp_path / "b")
    model = peft.PeftModel.from_pretrained(tiny(), str(tmp_path / "b"))
    with pytest.raises(NotMergeable):
        model.merge_and_unload()
    with pytest.raises(UsageError, match="for good"):
        model.merge_adapter()


def test_another_backbone_is_refused(tmp_path: Path) -> None:
    trained("adaptformer", tiny()).save(tmp_path / "a")
    other = tiny(seed=5)
    before = logits(other)
    with pytest.raises(BackboneMismatch, match="other weights"):
        peft.PeftModel.from_pretrained(other, str(tmp_path / "a"))
    assert torch.equal(logits(other), before)
    assert not any("petune" in key for key in other.state_dict())
    with pytest.raises(BackboneMismatch, match="number of classes"):
        peft.PeftModel.from_pretrained(tiny(num_classes=7), str(tmp_path / "a"))
    with pytest.raises(petune.PetuneError, match="PEFT's own"):
        peft.get_peft_model(tiny(), PetuneConfig(tuner="lora"))
    with pytest.raises(petune.PetuneError, match="adaptformer"):
        peft.get_peft_model(tiny(), PetuneConfig(tuner="adaptfromer"))
    with pytest.raises(petune.PetuneError, match="low_cpu_mem_usage"):
        peft.PeftModel.from_pretrained(tiny(), str(tmp_path / "a"), low_cpu_mem_usage=True)
    model = peft.PeftModel.from_pretrained(tiny(), str(tmp_path / "a"))
    with pytest.raises(UsageError, match=r"petune\.AdapterBank"):
        model(X, adapter_names=["default", "__base__"])


def test_the_enum_is_complete() -> None:
    petune.register_with_peft()  # a second time
    member = peft.PeftType("PETUNE")
    assert member is peft.PeftType.PETUNE is peft.PeftType["PETUNE"] is list(peft.PeftType)[-1]
    assert pickle.loads(pickle.dumps(member)) is member
    assert (member, member.value, f"{member.name}", repr(member)) == (
        "PETUNE", "PETUNE", "PETUNE", "<PeftType.PETUNE: 'PETUNE'>",
    )  # fmt: skip
    assert len(set(peft.PeftType)) == len(list(peft.PeftType)) == len(peft.PeftType)


@pytest.mark.exhaustive
def test_importing_petune_changes_nothing_in_peft() -> None:
    code = """
import sys
finders = [*sys.meta_path]
import petune
assert sys.meta_path == finders
import peft
petune.attach
assert "PETUNE" not in peft.PeftType.__members__
petune.register_with_peft()
assert peft.PeftType("PETUNE") in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_adapter_that_fails_leaves_the_active_one_active() -> None:
    model = peft.get_peft_model(tiny(), PetuneConfig(tuner="adaptformer"), "a")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.1)
    before = logits(model)
    with pytest.raises(ConfigError):
        model.add_adapter("b", PetuneConfig(tuner="adaptformer", config={"bottleneck": 0}))
    assert torch.equal(logits(model), before)
    model.add_adapter("b", PetuneConfig(tuner="vpt"))  # the name is free
    assert torch.equal(logits(model), before)


def test_what_is_loaded_for_inference_does_not_train(tmp_path: Path) -> None:
    for name in ("a", "b"):
        trained("adaptformer", tiny()).save(tmp_path / name)
    model = peft.PeftModel.from_pretrained(tiny(), str(tmp_path / "a"), adapter_name="a")
    model.load_adapter(str(tmp_path / "b"), adapter_name="b")
    assert [key for key, p in model.named_parameters() if p.requires_grad] == []
    model.delete_adapter("b")
    assert [key for key, p in model.named_parameters() if p.requires_grad] == []


@pytest.mark.filterwarnings("error:Unexpected keyword")
def test_a_classifier_that_does_not_train_belongs_to_the_file(tmp_path: Path) -> None:
    trained("adaptformer", tiny(), train_head=False).save(tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(tiny(), str(tmp_path / "a"))
    theirs.save_pretrained(str(tmp_path / "b"))
    other = tiny()
    nn.init.normal_(other.head.weight)
    with pytest.raises(BackboneMismatch, match="train_head=False"):
        peft.PeftModel.from_pretrained(other, str(tmp_path / "a"))
    with pytest.raises(BackboneMismatch, match="train_head=False"):
        petune.load(other, tmp_path / "b")
    assert petune.load(tiny(), tmp_path / "b").attached


def test_adapters_on_chosen_blocks_load_with_peft(tmp_path: Path) -> None:
    model = tiny()
    att = petune.attach(model, "adaptformer", sites=petune.find_sites(model).with_blocks([1]))
    with torch.no_grad():
        for parameter in att.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    att.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny(), str(tmp_path))
    with torch.no_grad():
        assert torch.equal(theirs.eval()(X), att.model.eval()(X))


@pytest.mark.filterwarnings("ignore:full leaves 1 parameter")
def test_what_the_author_fixed_is_known_to_peft(tmp_path: Path) -> None:
    model = tiny_models()["timm"]()
    model.pos_embed.requires_grad_(False)
    att = trained("full", model)
    att.save(tmp_path / "a")
    expected = logits(att.model)
    for fixed, place in ((False, "b"), (True, "c")):
        fresh = tiny_models()["timm"]()
        fresh.pos_embed.requires_grad_(not fixed)
        theirs = peft.PeftModel.from_pretrained(fresh, str(tmp_path / "a"))
        assert torch.equal(logits(theirs), expected)
        theirs.save_pretrained(tmp_path / place)
        again = petune.load(tiny_models()["timm"](), tmp_path / place)
        assert torch.equal(logits(again.model), expected)


def two_repadapters() -> Any:
    model = peft.get_peft_model(tiny(), PetuneConfig(tuner="repadapter"), "a")
    model.add_adapter("b", PetuneConfig(tuner="repadapter"))
    for name in ("a", "b"):
        model.set_adapter(name)
        for p in model.base_model.attachments[name].tuned.values():
            nn.init.normal_(p, std=0.3)
    return model


def test_the_adapter_that_is_named_is_merged() -> None:
    model = two_repadapters()
    model.set_adapter("a")
    expected = logits(model)
    model.set_adapter("b")
    for names in (["a", "b"], [], ["c"], "a"):
        with pytest.raises(UsageError, match="exactly one adapter"):
            model.merge_and_unload(adapter_names=names)
    merged = model.merge_and_unload(adapter_names=["a"])
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    assert list(merged.state_dict()) == list(tiny().state_dict())


def test_a_merge_that_is_refused_deletes_no_adapter() -> None:
    model = two_repadapters()
    model.add_adapter("c", PetuneConfig(tuner="adaptformer"))
    before = logits(model)
    with pytest.raises(NotMergeable):
        model.merge_and_unload(adapter_names=["c"])
    assert list(model.base_model.attachments) == ["a", "b", "c"]
    assert model.active_adapter == "b"
    assert torch.equal(logits(model), before)


def test_the_classifier_trains_while_others_are_loaded_and_deleted(tmp_path: Path) -> None:
    for name in ("a", "c"):
        trained("adaptformer", tiny()).save(tmp_path / name)
    model = peft.PeftModel.from_pretrained(tiny(), str(tmp_path / "a"), adapter_name="a")
    model.add_adapter("b", PetuneConfig(tuner="repadapter"))
    model.set_adapter("b")
    own = model.base_model.attachments["b"].parameters()
    model.load_adapter(str(tmp_path / "c"), adapter_name="c")
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in own}
    model.delete_adapter("c")
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in own}
    assert model.base_model.model.head.weight.requires_grad


@pytest.mark.filterwarnings("ignore:full trains 1 parameter")
def test_what_was_trained_although_the_author_fixed_it_loads_with_peft(tmp_path: Path) -> None:
    att = trained("full", tiny().requires_grad_(False))
    att.save(tmp_path)
    fresh = tiny()
    fresh.pos_embed.requires_grad_(False)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(fresh, str(tmp_path))), logits(att.model))
