"""AdaLoRA: trained as PEFT trains it, within its rank budget, with files that load in both libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import petune
from petune.base.errors import AttachError
from petune.plugin_dev.tiny_models import tiny_timm

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT and its dependencies warn of much
X = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
Y = torch.arange(6) % 3
OPTIONS: dict[str, Any] = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2}
STEPS = 8


def attached(**options: Any) -> petune.Attachment:
    torch.manual_seed(3)
    return petune.attach(tiny_timm(), "peft:adalora", **{**OPTIONS, **options})


def train(att: petune.Attachment, steps: range = range(STEPS)) -> petune.Attachment:
    optimizer = torch.optim.SGD(att.parameters(), lr=0.5)
    att.train()
    att.on_train_start(STEPS)
    for step in steps:
        loss = nn.functional.cross_entropy(att.model(X), Y) + att.loss(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        att.on_step_end(step)
    return att


def trained_by_peft() -> Any:
    """Do the same training with PEFT alone: its model, its regularizer, its call after each step."""
    wrapped = attached().tuner.wrapped
    config = peft.AdaLoraConfig(
        **OPTIONS, total_step=STEPS, target_modules=wrapped.config.target_modules, modules_to_save=["head"]
    )
    torch.manual_seed(3)
    model = peft.get_peft_model(tiny_timm(), config)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, lr=0.5)
    for step in range(STEPS):
        out = peft.tuners.adalora.AdaLoraModel.forward(model.base_model, ModelInput(model))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step + 1)
    return model


class ModelInput:
    """The input of PEFT's forward; see `forward_returns_a_loss`."""

    def __init__(self, model: Any) -> None:
        self.model = model


@pytest.fixture(autouse=True)
def forward_returns_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let timm's ViT return an output with a loss, which PEFT's forward adds its regularizer to."""
    import timm

    plain = timm.models.VisionTransformer.forward

    def forward(self: Any, x: Any, attn_mask: Any = None) -> Any:
        if isinstance(x, ModelInput):
            return OutputWithLoss(nn.functional.cross_entropy(plain(self, X), Y))
        return plain(self, x)

    monkeypatch.setattr(timm.models.VisionTransformer, "forward", forward)


class OutputWithLoss:
    def __init__(self, loss: torch.Tensor) -> None:
        self.loss = loss


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(X)


def num_ranks(att: petune.Attachment) -> int:
    return sum(int((p != 0).sum()) for key, p in att.tuned.items() if "lora_E" in key)


def test_training_equals_that_of_peft(tmp_path: Path) -> None:
    att, model = train(attached()), trained_by_peft()
    torch.testing.assert_close(logits(att.model), logits(model), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(att.model), logits(tiny_timm()), atol=1e-2)
    model.save_pretrained(tmp_path / "theirs")  # with the ranks that are left
    loaded = petune.load(tiny_timm(), tmp_path / "theirs")
    torch.testing.assert_close(logits(loaded.model), logits(model), atol=1e-5, rtol=1e-5)
    loaded.save(tmp_path / "again")
    for reader in (petune.load(tiny_timm(), tmp_path / "again").model, loaded_by_peft(tmp_path / "again")):
        assert torch.equal(logits(reader), logits(loaded.model))


def test_the_rank_budget_is_kept_and_saved(tmp_path: Path) -> None:
    att = attached()
    layers = len(att.tuner.wrapped.layers)
    train(att, range(1))
    assert num_ranks(att) == 4 * layers
    train(att, range(1, 4))
    assert 2 * layers < num_ranks(att) < 4 * layers
    train(att, range(4, STEPS))
    assert num_ranks(att) == 2 * layers
    att.save(tmp_path / "a")
    assert torch.equal(logits(petune.load(tiny_timm(), tmp_path / "a").model), logits(att.model))
    assert torch.equal(logits(loaded_by_peft(tmp_path / "a")), logits(att.model))
    before, scale = logits(att.model), float(logits(att.model).abs().max())
    att.merge()
    torch.testing.assert_close(logits(att.model), before, atol=1e-5 * scale, rtol=0)


def test_a_trained_adapter_can_be_trained_further() -> None:
    pattern = {f"{path}.lora_E": [True, True, False, False] for path in attached().tuner.wrapped.layers}
    att = train(attached(rank_pattern=pattern))
    assert num_ranks(att) == 2 * len(pattern)


def test_two_on_one_model_can_be_detached() -> None:
    built = tiny_timm()
    keys, names = list(built.state_dict()), [name for name, _ in built.named_modules()]
    first = petune.attach(built, "peft:adalora", name="lora_one", **OPTIONS)
    second = petune.attach(built, "peft:adalora", name="two", **OPTIONS)
    train(second)
    train(first)
    first.detach()
    assert num_ranks(second) == 2 * len(second.tuner.wrapped.layers)
    second.detach()
    assert (list(built.state_dict()), [name for name, _ in built.named_modules()]) == (keys, names)


def test_budgets_that_cannot_be_kept_are_refused() -> None:
    with pytest.raises(AttachError, match="init_r above target_r"):
        attached(init_r=2)
    with pytest.raises(AttachError, match="leaves 0 of the 8 steps"):
        attached(tfinal=7).on_train_start(8)
    with pytest.raises(AttachError, match="leaves 1 of the 3 steps"):
        attached(tinit=0).on_train_start(3)
    with pytest.raises(AttachError, match=r"Call att.on_train_start\(total_steps\)"):
        attached().on_step_end(0)


def loaded_by_peft(path: Path) -> nn.Module:
    model: nn.Module = peft.PeftModel.from_pretrained(tiny_timm(), str(path))
    return model
