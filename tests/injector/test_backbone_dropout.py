"""Dropout and drop path of the backbone act in training for every method alike, or for none."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import petune
from petune.sites.random_draws import keeps_statistics
from tests.sampling import sampled
from tests.tiny import X, tiny

METHODS = ["linear", "adaptformer", "vpt", "lora", "bitfit", "partial", "fact", "lst", "full"]
RATES = [{"drop_path_rate": 0.5}, {"attn_drop_rate": 0.5}, {"proj_drop_rate": 0.5}, {"pos_drop_rate": 0.5}]


def _is_random(model: nn.Module) -> bool:
    outputs = []
    for seed in range(3):
        torch.manual_seed(seed)
        outputs.append(model(X))
    return not all(torch.equal(out, outputs[0]) for out in outputs)


def _without_own_dropout(model: nn.Module, backbone: set[nn.Module]) -> None:
    """Set the rates of the method's own dropout to zero."""
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module not in backbone:
            module.p = 0.0


@pytest.mark.parametrize("rates", RATES, ids=lambda rates: next(iter(rates)))
@pytest.mark.parametrize("method", sampled(METHODS, {"adaptformer", "full", "vpt"}.__contains__))
def test_a_rate_acts_for_every_method(method: str, rates: dict[str, float]) -> None:
    model = tiny(**rates)
    backbone = set(model.modules())
    att = petune.attach(model, method)
    _without_own_dropout(model, backbone)
    with torch.no_grad():
        before = model(X)
        assert att.set_backbone_dropout(True) > 0
        assert torch.equal(model(X), before)  # eval mode is unchanged
        att.train()
        assert _is_random(model)
        model.eval()
        assert torch.equal(model(X), before)
        assert att.set_backbone_dropout(False) > 0
        att.train()
        assert not _is_random(model)


@pytest.mark.parametrize("rate", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
@pytest.mark.parametrize("method", ["linear", "adaptformer:dropout=0", "full"])
def test_a_rate_of_transformers_acts_for_every_method(method: str, rate: str) -> None:
    import transformers

    torch.manual_seed(0)
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.ViTConfig(**shape, image_size=16, patch_size=4, **{rate: 0.5})
    model = transformers.ViTForImageClassification(config)
    model.register_forward_hook(lambda module, args, output: output.logits)
    att = petune.attach(model, method)
    with torch.no_grad():
        assert att.set_backbone_dropout(True) > 0
        att.train()
        assert _is_random(model)
        att.set_backbone_dropout(False)
        att.train()
        assert not _is_random(model)


def test_without_a_choice_drop_path_acts_where_the_method_trains() -> None:
    for method, acts in (("linear", False), ("full", True)):
        att = petune.attach(tiny(drop_path_rate=0.5), method)
        att.train()
        assert _is_random(att.model) == acts


def test_batchnorm_of_a_frozen_backbone_stays_in_eval() -> None:
    import timm

    model = timm.create_model("levit_128s", num_classes=3, drop_path_rate=0.3, img_size=64)
    att = petune.attach(model, "linear", input_size=(3, 64, 64))
    assert att.set_backbone_dropout(True) > 0
    att.train()
    head = {id(p) for p in att.head.values()}
    frozen = [m for m in model.modules() if keeps_statistics(m) and not any(id(p) in head for p in m.parameters())]
    assert frozen
    assert not any(m.training for m in frozen)


def test_dropout_of_the_method_is_left_alone() -> None:
    att = petune.attach(tiny(drop_path_rate=0.5), "lora", lora_dropout=0.5)
    with torch.no_grad():
        for p in att.tuned.values():
            nn.init.normal_(p)
    att.set_backbone_dropout(False)
    att.train()
    assert _is_random(att.model)


def test_an_encoder_layer_of_pytorch_drops_in_frozen_blocks() -> None:
    """In eval mode it would run as one kernel, without dropout."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(24, 2, 48, dropout=0.5, batch_first=True)
            self.patches = nn.Conv2d(3, 24, 4, 4)
            self.encoder = nn.TransformerEncoder(layer, 2)
            self.head = nn.Linear(24, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.encoder(self.patches(x).flatten(2).mT).mean(1))

    torch.manual_seed(0)
    att = petune.attach(Encoder(), "linear", input_size=(3, 16, 16))
    att.set_backbone_dropout(True)
    att.train()
    with torch.no_grad():
        assert _is_random(att.model)


def test_a_copy_and_a_detached_model() -> None:
    model = tiny(drop_path_rate=0.5)
    att = petune.attach(model, "linear")
    att.set_backbone_dropout(True)
    copied = copy.deepcopy(model)
    assert _is_random(copied.train())
    assert copied.blocks[1].drop_path1.training
    att.detach()
    model.train()
    assert model.blocks[0].attn.training
