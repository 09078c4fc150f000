"""Optimizer groups by rule, learning rates by formula."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn
from torchvision.models import VisionTransformer

import petune
from petune.injector.param_groups import undecayed_keys
from petune.training.config import TrainConfig
from petune.training.optim import create_optimizer, create_schedule

TRAIN = TrainConfig(lr=0.5, weight_decay=0.1, optimizer="sgd")


def _parameters() -> dict[str, nn.Parameter]:
    shapes = {"w": (3, 2), "b": (3,), "scale": (), "pos_embed": (1, 4, 2)}
    return {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}


def _optimizer(train: TrainConfig = TRAIN) -> torch.optim.Optimizer:
    return create_optimizer(_parameters(), {"pos_embed"}, train)


def test_only_matrices_decay_unless_the_model_exempts_them() -> None:
    parameters = _parameters()
    optimizer = create_optimizer(parameters, {"pos_embed"}, TRAIN)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in parameters.items()} == {
        "w": 0.1,
        "b": 0,
        "scale": 0,
        "pos_embed": 0,
    }
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(parameters)


class _Factors(nn.Module):
    """As PEFT's IA3 stores them."""

    def __init__(self) -> None:
        super().__init__()
        self.ia3_l = nn.Parameter(torch.ones(1, 6))
        self.lora_E = nn.ParameterDict({"default": nn.Parameter(torch.ones(6, 1))})


def test_vectors_stored_as_matrices_do_not_decay() -> None:
    """Factors of PEFT's IA3 start at 1: decay would pull what they multiply to zero."""
    model = _Factors()
    (group,) = create_optimizer(dict(model.named_parameters()), undecayed_keys(model), TRAIN).param_groups
    assert group["weight_decay"] == 0


def test_the_weight_of_a_regression_to_one_number_decays() -> None:
    """Its shape, (1, D), is that of a vector; --weight-decay had no effect on it."""
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=1)
    att = petune.attach(model, "linear")
    decays = {key: group["weight_decay"] for group in att.param_groups(0.1) for key in _keys(att, group["params"])}
    assert decays == {"head.weight": 0.1, "head.bias": 0}


def test_lora_of_rank_1_decays_as_of_any_rank() -> None:
    """Its matrices have one row or column."""
    att = petune.attach(timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=2), "lora", r=1)
    (undecayed,) = (group for group in att.param_groups(0.1) if not group["weight_decay"])
    assert _keys(att, undecayed["params"]) == ["head.bias"]


def _keys(att: petune.Attachment, parameters: list[nn.Parameter]) -> list[str]:
    ids = {id(p) for p in parameters}
    return [key for key, p in {**att.tuned, **att.head}.items() if id(p) in ids]


def test_class_token_and_position_embedding_do_not_decay() -> None:
    """timm's models list them; in others they are found by shape, without the prompts that VPT adds."""
    model = VisionTransformer(
        image_size=8, patch_size=4, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8, num_classes=2
    )
    positions = {"class_token", "encoder.pos_embedding"}
    assert undecayed_keys(model) == positions
    petune.attach(model, "vpt", num_prompts=2)
    assert undecayed_keys(model) == positions
    timms = timm.create_model("vit_tiny_patch16_224", depth=1)
    assert undecayed_keys(timms) == timms.no_weight_decay()  # type: ignore[operator]


def test_decay_vectors_decays_everything() -> None:
    (group,) = _optimizer(TRAIN.model_copy(update={"decay_vectors": True})).param_groups
    assert (len(group["params"]), group["weight_decay"]) == (4, 0.1)


def test_no_group_is_empty() -> None:
    optimizer = create_optimizer({"b": nn.Parameter(torch.ones(3))}, set(), TRAIN)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]


def test_the_optimizer_applies_weight_decay() -> None:
    parameters = _parameters()
    optimizer = create_optimizer(parameters, {"pos_embed"}, TRAIN.model_copy(update={"optimizer": "adamw"}))
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.allclose(parameters["w"], torch.full((3, 2), 1 - 0.5 * 0.1))
    assert all(torch.equal(p, torch.ones_like(p)) for name, p in parameters.items() if name != "w")


def _rates(train: TrainConfig, total: int) -> list[float]:
    optimizer = _optimizer(train)
    schedule = create_schedule(optimizer, train, total)
    rates = []
    for step in range(total):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def _cosine(step: int, warmup: int, total: int, lr: float) -> float:
    if step < warmup:
        return lr * step / warmup
    return lr / 2 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


@pytest.mark.parametrize(("warmup", "total"), [(0.1, 50), (0.0, 50), (7.0, 20), (100.0, 10), (0.1, 1), (0.5, 3)])
def test_cosine_schedule_with_warmup(warmup: float, total: int, caplog: pytest.LogCaptureFixture) -> None:
    train = TRAIN.model_copy(update={"warmup": warmup})
    steps = train.warmup_steps(total)
    expected = [_cosine(step, steps, total, 0.5) for step in range(total)]
    assert _rates(train, total) == pytest.approx(expected, abs=1e-12)
    assert caplog.text == ""  # timm's cosine of one step logs that it has no effect


@pytest.mark.parametrize(("warmup", "total"), [(0.1, 50), (0.0, 50), (7.0, 20)])
def test_constant_schedule_with_warmup(warmup: float, total: int) -> None:
    train = TRAIN.model_copy(update={"warmup": warmup, "schedule": "constant"})
    steps = train.warmup_steps(total)
    expected = [0.5 * min(1, step / steps) if steps else 0.5 for step in range(total)]
    assert _rates(train, total) == pytest.approx(expected, abs=1e-12)


def test_both_groups_follow_the_schedule() -> None:
    optimizer = _optimizer()
    create_schedule(optimizer, TRAIN, 10).step_update(5)
    assert len({group["lr"] for group in optimizer.param_groups}) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="on CUDA bfloat16 is fast and stays")
def test_muon_orthogonalizes_in_float32_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.optim import muon

    seen: list[torch.dtype] = []
    real = muon.zeropower_via_newtonschulz
    inner = getattr(real, "func", real)

    def spy(*args: object, dtype: torch.dtype = torch.bfloat16, **kwargs: object) -> torch.Tensor:
        seen.append(dtype)
        return inner(*args, dtype=dtype, **kwargs)

    monkeypatch.setattr(muon, "zeropower_via_newtonschulz", spy)
    parameters = {"w": nn.Parameter(torch.randn(8, 8))}
    optimizer = create_optimizer(parameters, set(), TRAIN.model_copy(update={"optimizer": "nmuon"}))
    parameters["w"].grad = torch.randn(8, 8)
    optimizer.step()
    assert seen
    assert set(seen) == {torch.float32}
