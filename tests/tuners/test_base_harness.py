"""Every tuner on a base in bfloat16, with int8 weights, compiled, and with two libraries' gradient checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petune
from petune.plugin_dev.tiny_models import tiny_timm, tiny_transformers
from petune.sites.logits import logits_of
from tests.injector.quantized import Int8Weight, quantize
from tests.tiny import randomised

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT reads it
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # dynamo, in PEFT's DoRA
]
X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 0])
TRAINS_BACKBONE = {"full", "gps", "l2sp", "partial"}


def bfloat16() -> nn.Module:
    return tiny_timm().bfloat16()


def int8() -> nn.Module:
    return quantize(tiny_timm())


def dequantized() -> nn.Module:
    model = int8()
    for module in model.modules():
        if isinstance(getattr(module, "weight", None), Int8Weight):
            weight: Any = module.weight
            module.weight = nn.Parameter(weight.values())
    return model


def checkpointed_timm() -> nn.Module:
    model: Any = tiny_timm()
    model.set_grad_checkpointing(True)
    return model  # type: ignore[no-any-return]


def checkpointed_transformers() -> nn.Module:
    model: Any = tiny_transformers()
    model.activation_checkpointing_enable()
    return model  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Base:
    """A kind of backbone.

    Attributes:
        build: Makes one.
        reference: Makes the plain float32 one with the same values, for the gradients.
        tolerance: Largest difference from its gradients, relative to their norm.
        run: What is called for the model once something is attached.
    """

    build: Callable[[], nn.Module]
    reference: Callable[[], nn.Module]
    tolerance: float = 1e-5
    run: Callable[[nn.Module], Any] = lambda model: model


BASES = {
    "bfloat16": Base(bfloat16, lambda: bfloat16().float(), 0.1),
    "int8": Base(int8, dequantized),
    "compiled": Base(tiny_timm, tiny_timm, run=lambda model: torch.compile(model, backend="aot_eager")),
    "timm": Base(checkpointed_timm, tiny_timm),
    "transformers": Base(checkpointed_transformers, tiny_transformers),
}
TUNERS = [record.name for record in petune.list_tuners() if record.name != "peft"]  # it needs a type: test_peft_harness
SAMPLE = {
    *(("bfloat16", name) for name in ("dyt", "fact", "lora", "vpt")),
    *(("int8", name) for name in ("full", "dora", "sct", "ssf")),
    *(("timm", name) for name in ("lst", "houlsby")),
    *(("transformers", name) for name in ("convpass", "lora")),
}
"""Combinations that every run of the tests tries, with tests/injector/test_compiled.py; `make test-all` tries all."""


def combinations() -> list[Any]:
    return [
        pytest.param(base, name, id=f"{base}-{name}", marks=[] if (base, name) in SAMPLE else pytest.mark.exhaustive)
        for base in BASES
        for name in TUNERS
    ]


def images(model: nn.Module) -> Tensor:
    return X.to(next(p for p in model.parameters() if p.is_floating_point()).dtype)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return logits_of(model.eval()(images(model)))


def calibrated(att: petune.Attachment) -> petune.Attachment:
    """Return the attachment after it has chosen what it trains, if it chooses."""
    att.calibrate([(images(att.model), LABELS)])
    return att


def set_dropout_to_zero(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def gradients(att: petune.Attachment, run: Any) -> dict[str, Tensor]:
    """Return the gradients of the loss, after checks that each parameter has one other than zero."""
    att.train()
    att.model.zero_grad()
    torch.manual_seed(3)
    loss = nn.functional.cross_entropy(logits_of(run(images(att.model))).float(), LABELS) + att.loss(0)
    assert torch.isfinite(loss)
    loss.backward()
    att.check_gradients(under_way=True)
    found = {key: p.grad.float() for key, p in {**att.tuned, **att.head}.items() if p.grad is not None}
    # of a key's bias, softmax takes the effect out again
    assert not [key for key, g in found.items() if not g.any() and "qkv.bias" not in key and "key.bias" not in key]
    return found


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    error = sum(float((found[key] - g).square().sum()) for key, g in expected.items())
    return float((error / sum(float(g.square().sum()) for g in expected.values())) ** 0.5)


def train(att: petune.Attachment, run: Any) -> None:
    """Do two steps of training."""
    optimizer = torch.optim.SGD(att.param_groups(), lr=1e-2)
    att.on_train_start(2)
    att.train()
    for step in range(2):
        loss = nn.functional.cross_entropy(logits_of(run(images(att.model))).float(), LABELS) + att.loss(step)
        assert torch.isfinite(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        att.on_step_end(step)


@pytest.mark.parametrize(("kind", "name"), combinations())
def test_a_tuner_trains_saves_and_comes_off(kind: str, name: str, tmp_path: Path) -> None:
    base = BASES[kind]
    torch.compiler.reset()
    model = base.build()
    state = {key: t.clone() for key, t in model.state_dict().items()}
    plain = logits(model)
    if kind == "int8" and name in TRAINS_BACKBONE:
        with pytest.raises(petune.AttachError, match="quantized"):
            petune.attach(model, name)
        assert torch.equal(logits(model), plain)
        return
    torch.manual_seed(0)  # one at which dyt's loss is not zero: its gates choose another share than half
    att = randomised(calibrated(petune.attach(model, name)))
    reference = petune.attach(base.reference(), name)
    with torch.no_grad():
        for key, t in reference.state().items():
            t.copy_(att.state()[key])
    if kind == "bfloat16":  # it draws another dropout
        set_dropout_to_zero(model)
        set_dropout_to_zero(reference.model)
    run = base.run(model)
    assert difference(gradients(att, run), gradients(reference, reference.model)) < base.tolerance
    before = logits(model)
    train(att, run)
    trained = logits(model)
    assert not torch.equal(trained, before)
    att.save(tmp_path / "out")
    loaded = petune.load(base.build(), tmp_path / "out")
    assert torch.equal(logits(loaded.model), trained)
    att.detach()
    assert torch.equal(logits(model), plain)
    now = model.state_dict()
    assert now.keys() == state.keys()
    assert all(torch.equal(now[key], t) for key, t in state.items())
