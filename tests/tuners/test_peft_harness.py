"""Every PEFT type, twice on one model, in train and in eval mode, on ViTs of several kinds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import petune
from petune.base.errors import AttachError
from petune.sites.logits import logits_of
from petune.tuners.peft_bridge.options import peft_types
from tests.tuners.peft_bases import BASES

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT and its dependencies warn of much

TYPES = [*sorted(peft_types()), "dora"]
ONE_AT_A_TIME = {"frod", "hra", "ln_tuning", "shira", "supertuning"}
SAMPLE = {
    *(("timm", kind) for kind in ("dora", "ln_tuning", "vblora")),
    ("encoder", "oft"),
    ("torchvision", "lora"),
    ("transformers", "c3a"),
}
"""Combinations that every run of the tests tries; `make test-all` tries all."""
X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


SMALL = {"psoft": {"r": 8}, "fourierft": {"n_frequency": 100}}
"""Options of types whose defaults are too large for these models."""


def combinations() -> list[object]:
    """Return every base with every type."""
    return [
        pytest.param(base, kind, id=f"{base}-{kind}", marks=[] if (base, kind) in SAMPLE else pytest.mark.exhaustive)
        for base in BASES
        for kind in TYPES
    ]


def method(kind: str) -> str:
    """Return the method's name."""
    return kind if kind == "dora" else f"peft:{kind}"


def attached(model: nn.Module, kind: str, name: str, **options: object) -> petune.Attachment:
    """Attach a type without the classifier, with values away from their start."""
    att = petune.attach(model, method(kind), name=name, train_head=False, **SMALL.get(kind, {}), **options)
    generator = torch.Generator().manual_seed(len(name) + ord(name[0]))
    with torch.no_grad():
        for p in att.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.05)
    return att


@torch.no_grad()
def logits(model: nn.Module, *, train: bool = False) -> Tensor:
    """Return the logits, with one random state for all calls."""
    torch.manual_seed(7)
    return logits_of(model.train(train)(X))


def check_gradients(*attachments: petune.Attachment) -> None:
    """Check that every tuned tensor gets a gradient other than zero in train mode."""
    model = attachments[0].model.train()
    model.zero_grad()
    logits_of(model(X)).square().sum().backward()
    for att in attachments:
        silent = [key for key, p in att.tuned.items() if p.grad is None or not p.grad.any()]
        # GLoRA's E shifts all channels equally, which the norm behind a residual addition takes out again
        silent = [key for key in silent if "glora_E" not in key]
        assert not silent, f"{att.name}: {silent}"


def check_alive_and_exact(att: petune.Attachment, plain: Tensor) -> None:
    """Check that the attachment acts in both modes, and that disabling it gives the backbone back to the bit."""
    before = logits(att.model)
    for train in (False, True):
        assert not torch.allclose(logits(att.model, train=train), plain, atol=1e-4)
    with att.disabled():
        assert torch.equal(logits(att.model), plain)
        assert torch.equal(logits(att.model, train=True), plain)
    assert torch.equal(logits(att.model), before)
    check_gradients(att)


@pytest.mark.parametrize(("base", "kind"), combinations())
def test_one_adapter_acts_in_both_modes(base: str, kind: str, tmp_path: Path) -> None:
    model = BASES[base]()
    plain, modules = logits(model), dict(model.named_modules())
    petune.attach(model, method(kind), name="start", train_head=False, **SMALL.get(kind, {})).detach()
    assert torch.equal(logits(model), plain)
    att = attached(model, kind, "one")
    check_alive_and_exact(att, plain)
    alone = logits(model)
    att.save(tmp_path / "one")
    loaded = petune.load(BASES[base](), tmp_path / "one")
    assert torch.equal(logits(loaded.model), alone)
    if base != "encoder":  # torch's fused kernel does not call PEFT's layers
        theirs = peft.PeftModel.from_pretrained(BASES[base](), str(tmp_path / "one"))
        assert torch.equal(logits(theirs), alone)
    att.detach()
    assert torch.equal(logits(model), plain)
    assert dict(model.named_modules()) == modules


@pytest.mark.parametrize(("base", "kind"), combinations())
def test_two_adapters_are_independent(base: str, kind: str, tmp_path: Path) -> None:
    model = BASES[base]()
    plain, modules = logits(model), dict(model.named_modules())
    one = attached(model, kind, "one")
    alone = logits(model)
    together = kind not in ONE_AT_A_TIME
    if not together:
        before = dict(model.named_modules())
        with pytest.raises(AttachError):
            petune.attach(model, method(kind), name="two", train_head=False)
        assert torch.equal(logits(model), alone)
        assert dict(model.named_modules()) == before
        one.disable()
        assert torch.equal(logits(model), plain)
    two = attached(model, kind, "two")
    if not together:
        with pytest.raises(AttachError, match="only one"):
            one.enable()
    else:
        both = logits(model)
        check_gradients(one, two)
        one.disable()
    check_alive_and_exact(two, plain)
    second = logits(model)
    two.save(tmp_path / "two")
    two.disable()
    assert torch.equal(logits(model), plain)
    one.enable()
    assert torch.equal(logits(model), alone)
    check_alive_and_exact(one, plain)
    one.save(tmp_path / "one")
    if together:
        two.enable()
        assert torch.equal(logits(model), both)
        assert not torch.allclose(both, alone)
        assert not torch.allclose(both, second)
    for name, wanted in (("one", alone), ("two", second)):
        assert torch.equal(logits(petune.load(BASES[base](), tmp_path / name).model), wanted)
    one.detach()
    if not together:
        two.enable()
    assert torch.equal(logits(model), second)
    two.detach()
    assert torch.equal(logits(model), plain)
    assert dict(model.named_modules()) == modules


@pytest.mark.parametrize(("base", "kind"), combinations())
def test_a_bank_holds_two_adapters(base: str, kind: str, tmp_path: Path) -> None:
    expected = {}
    for name in ("one", "two"):
        att = attached(BASES[base](), kind, name)
        att.save(tmp_path / name)
        expected[name] = logits(att.model)
    bank = petune.AdapterBank(BASES[base]())
    plain = logits(bank.model)
    for name in expected:
        bank.load(name, tmp_path / name)
    for name, wanted in expected.items():
        assert torch.equal(logits(bank.use(name)), wanted)
    bank.remove("one")
    assert torch.equal(logits(bank.use("two")), expected["two"])
    bank.remove("two")
    assert torch.equal(logits(bank.model), plain)


def dropouts() -> list[object]:
    """Return every option of every type that drops something in training."""
    types = {**peft_types(), "dora": peft_types()["lora"]}
    cases = [
        (kind, f.name) for kind in TYPES for f in dataclasses.fields(types[kind])
        if f.name.endswith("dropout") and kind != "oft"
    ]  # fmt: skip
    sampled = {("dora", "lora_dropout"), ("loha", "module_dropout"), ("lokr", "rank_dropout"), ("lora", "lora_dropout")}
    return [
        pytest.param(base, *case, marks=[] if case in sampled and base == "timm" else pytest.mark.exhaustive)
        for base in BASES
        for case in cases
    ]


NEEDED = {"supertuning": {"r": 4}}
"""Options without which a type has nothing to drop."""


@pytest.mark.parametrize(("base", "kind", "option"), dropouts())
def test_dropout_acts_in_train_mode_only(base: str, kind: str, option: str) -> None:
    options = {"targets": "mlp", **NEEDED.get(kind, {})}  # LoRA changes torch's attention without dropout only
    model = attached(BASES[base](), kind, "one", **options, **{option: 0.5}).model
    with torch.no_grad():
        draws = [logits_of(model.train()(X)) for _ in range(8)]
    assert any(not torch.equal(draw, draws[0]) for draw in draws)
    assert torch.equal(logits_of(model.eval()(X)), logits_of(model(X)))
    assert torch.equal(logits(model), logits(attached(BASES[base](), kind, "one", **options).model))
