"""Speed-ups that change no result: checkpointed blocks, frozen weights in bfloat16, compiled forwards."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import petune
from petune.base.errors import ConfigError
from petune.training.speed.bf16_weights import store_in_bf16
from petune.training.speed.grad_checkpointing import checkpoint_blocks, checkpointable
from tests.sampling import sampled
from tests.tiny import X, tiny
from tests.training.steps import logits_of, same, step

Make = Callable[..., Any]
METHODS: dict[str, dict[str, Any]] = {
    "adaptformer": {"bottleneck": 4, "dropout": 0.3}, "vpt": {"num_prompts": 3, "dropout": 0.3},
    "lora": {"r": 2, "lora_dropout": 0.3}, "dora": {"r": 2}, "bitfit": {}, "full": {}, "fact": {}, "repadapter": {},
    "houlsby": {}, "lst": {"reduction": 2}, "partial": {}, "linear": {},
}  # fmt: skip


def _attached(method: str, model: nn.Module | None = None, size: int = 16) -> petune.Attachment:
    torch.manual_seed(1)
    model = tiny(drop_path_rate=0.2) if model is None else model
    att = petune.attach(model, method, input_size=(3, size, size), **METHODS[method])
    with torch.no_grad():
        for p in att.tuned.values():
            p.add_(torch.randn_like(p), alpha=0.02)
    att.set_backbone_dropout(True)
    att.train()
    return att


def _counted(module: nn.Module) -> list[None]:
    calls: list[None] = []
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return original(*args, **kwargs)

    module.forward = forward  # type: ignore[method-assign]
    return calls


@pytest.mark.parametrize("method", [m for m in METHODS if m not in {"linear", "lst"}])
def test_checkpointed_blocks_give_the_same_logits_and_gradients(method: str) -> None:
    att = _attached(method)
    plain = step(att)
    calls = _counted(att.sites.blocks[-1].enter)
    with checkpoint_blocks(att) as count:
        again = [step(att) for _ in range(2)]
    assert count == 2
    assert same(again[0], plain)
    assert same(again[1], plain)  # nothing stayed behind in a holder
    assert len(calls) == 4
    assert same(step(att), plain)
    att.detach()
    assert all(m._compiled_call_impl is None for m in att.model.modules())


def test_a_model_without_blocks_to_checkpoint_is_an_error() -> None:
    att = _attached("lst")
    assert checkpointable(att) == []
    with pytest.raises(ConfigError, match="grad_checkpointing is not possible"), checkpoint_blocks(att):
        pass


def _torchvision() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(16, 4, 2, 2, 24, 48, num_classes=5)


def _transformers() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=16, patch_size=4, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    return transformers.ViTForImageClassification(config)  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [_torchvision, _transformers])
def test_checkpointing_works_with_other_libraries(make: Callable[[], nn.Module]) -> None:
    att = _attached("adaptformer", make())
    plain = step(att)
    calls = _counted(att.sites.blocks[-1].enter)
    with checkpoint_blocks(att) as count:
        assert same(step(att), plain)
    assert (count, len(calls)) == (2, 2)


def test_blocks_below_the_lowest_tuner_run_once_and_get_no_gradient() -> None:
    att = _attached("partial", tiny(depth=3))
    frozen, trained = (_counted(att.sites.blocks[i].enter) for i in (0, 2))
    below: list[bool] = []
    att.sites.blocks[2].enter.register_forward_pre_hook(lambda m, args: below.append(args[0].requires_grad))
    with checkpoint_blocks(att):
        step(att)
    assert (len(frozen), len(trained)) == (1, 2)
    assert not any(below)


TARGETS = [("memory", "adaptformer"), ("no such directory", "lora"), *(("file", method) for method in METHODS)]


@pytest.mark.parametrize(("target", "method"), sampled(TARGETS, lambda row: row in TARGETS[:6]))
def test_frozen_weights_in_bfloat16_give_the_same_bits(method: str, target: str, tmp_path: Path) -> None:
    directory = {"memory": None, "file": tmp_path, "no such directory": tmp_path / "none"}[target]
    att = _attached(method)
    before = {key: t.clone() for key, t in att.model.state_dict().items()}
    identity, plain = att.fingerprint(), step(att, bf16=True)

    with store_in_bf16(att.model, logits_of(att.model), directory) as size:
        assert list(tmp_path.iterdir()) == []  # nothing that a kill could leave behind
        assert same(step(att, bf16=True), plain)
        assert all(p.dtype == torch.float32 for p in att.parameters())
        stored = [p for p in att.model.parameters() if p.dtype == torch.bfloat16]
        assert sum(2 * p.numel() for p in stored) == size
        assert (len(stored) > 8) == (method not in {"full", "dora"})  # DoRA reads the weights of all layers it is on
    assert att.fingerprint() == identity
    after = att.model.state_dict()
    assert [key for key, t in before.items() if not torch.equal(t, after[key]) or t.dtype != after[key].dtype] == []


class Reads(nn.Module):
    """Reads a frozen weight outside of autocast."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.inside.blocks[0].mlp.fc1.weight  # type: ignore[union-attr, index]
        return self.inside(x) * weight.float().norm()  # type: ignore[no-any-return]


def test_weights_that_are_read_in_another_way_stay_in_float32() -> None:
    torch.manual_seed(0)
    model = Reads(tiny()).requires_grad_(False)

    with store_in_bf16(model, logits_of(model)):
        assert model.inside.blocks[0].mlp.fc1.weight.dtype == torch.float32
        assert model.inside.blocks[0].mlp.fc2.weight.dtype == torch.bfloat16
        assert model.inside.norm.weight.dtype == model.inside.pos_embed.dtype == torch.float32


def test_weights_stay_in_float32_if_the_logits_would_change() -> None:
    model, calls = tiny().requires_grad_(False), [0.0, 1.0]
    with torch.autocast("cpu", torch.bfloat16):
        model(X)

        def logits() -> Tensor:
            return model(X) + calls.pop()

        with store_in_bf16(model, logits) as size:
            assert size == 0
            assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_weights_are_restored_after_an_error() -> None:
    model = tiny().requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(KeyError), store_in_bf16(model, lambda: model(X)):
        raise KeyError
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def _vit8(method: str) -> petune.Attachment:
    torch.manual_seed(0)
    shape = {"img_size": 8, "patch_size": 4, "depth": 2, "embed_dim": 12, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224", drop_path_rate=0.2, **shape)
    torch.manual_seed(1)
    return petune.attach(model, method, **METHODS[method])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointing_does_not_change_a_run(precision: str, tmp_path: Path, make_trainer: Make) -> None:
    found = []
    for on in (False, True):
        att = _vit8("adaptformer")
        trainer = make_trainer(att, directory=tmp_path / str(on), grad_checkpointing=on, precision=precision)
        epochs = trainer.fit().epochs
        found.append((epochs, att.state(), trainer.evaluate("test")))
        att.save(tmp_path / f"adapter-{on}")
    assert found[0][0] == found[1][0]
    assert found[0][2] == found[1][2]
    assert all(torch.equal(t, found[1][1][key]) for key, t in found[0][1].items())
    a, b = ((tmp_path / f"adapter-{on}" / "adapter_config.json").read_bytes() for on in (False, True))
    assert a == b


def test_a_run_in_bfloat16_saves_an_adapter_for_the_original_weights(tmp_path: Path, make_trainer: Make) -> None:
    att = _vit8("adaptformer")
    make_trainer(att, directory=tmp_path / "run", precision="bf16").fit()
    att.save(tmp_path / "adapter")
    fresh = _vit8("adaptformer")
    fresh.detach()
    petune.load(fresh.model, tmp_path / "adapter")


@pytest.mark.exhaustive
def test_checkpointed_blocks_compile_into_one_graph() -> None:
    att, graphs = _attached("adaptformer"), list[str]()
    plain = step(att)

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    compiled = torch.compile(att.model, backend=backend, fullgraph=True)
    with checkpoint_blocks(att), torch._dynamo.config.patch({"skip_fwd_side_effects_in_bwd_under_checkpoint": True}):
        att.model, model = compiled, att.model
        found = step(att)
    att.model = model
    assert len(graphs) == 1
    assert "checkpoint" in graphs[0]
    assert torch.allclose(found[0], plain[0], atol=1e-6)  # type: ignore[arg-type]
    assert len(found) == len(plain)


def test_every_model_of_a_comparison_is_compiled(
    make_trainer: Make, toy: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default torch leaves the ninth model of a class, and all after it, uncompiled."""
    compiled = 0

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal compiled
        compiled += 1
        return graph

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    for depth in range(10):
        att = toy(0)
        att.model.body.extend(nn.Identity() for _ in range(depth))
        trainer = make_trainer(att, compile=True)
        with trainer.speedups():
            trainer.forward.train(torch.zeros(6, 3, 8, 8))
    assert compiled == 10


@pytest.mark.skipif(not os.environ.get("PETUNE_SLOW"), reason="compiles for a minute; set PETUNE_SLOW=1")
def test_a_compiled_run_has_nearly_the_same_losses(tmp_path: Path, make_trainer: Make) -> None:
    losses = []
    for on in (False, True):
        trainer = make_trainer(_vit8("adaptformer"), directory=tmp_path / str(on), compile=on, lr=0.01)
        losses.append([epoch["train_loss"] for epoch in trainer.fit().epochs])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_running_statistics_are_updated_once_per_step() -> None:
    states = []
    for again in (False, True):
        torch.manual_seed(0)
        model = timm.create_model("levit_128s", num_classes=3, drop_path_rate=0.0, img_size=64)
        att = petune.attach(model, "full", input_size=(3, 64, 64))
        att.train()
        x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        with checkpoint_blocks(att) if again else nullcontext():
            for _ in range(2):
                step(att, x)
        states.append(dict(att.model.named_buffers()))
    assert any("running_mean" in key for key in states[0])
    assert [key for key, t in states[0].items() if not torch.equal(t, states[1][key])] == []
