"""LoRA on q and v alone: as in a model with a layer for each, also where one layer makes q, k and v."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import petune
from petune.base.errors import AttachError, ConfigError
from petune.plugin_dev.tiny_models import tiny_models
from tests.tiny import X, randomised, tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def attached(targets: object = "q,v", **options: object) -> petune.Attachment:
    torch.manual_seed(0)
    return randomised(petune.attach(tiny(), "lora", targets=targets, r=2, lora_alpha=4, **options))


def factors(att: petune.Attachment, block: int) -> tuple[Tensor, Tensor]:
    found = {key: p for key, p in att.tuned.items() if key.startswith(f"blocks.{block}.")}
    return tuple(next(p for key, p in found.items() if f"lora_{kind}" in key) for kind in "AB")  # type: ignore[return-value]


@pytest.mark.parametrize(("rslora", "scale"), [(False, 4 / 2), (True, 4 / 2**0.5)])
def test_q_and_v_of_a_fused_layer_change_as_layers_of_their_own(rslora: bool, scale: float) -> None:
    att = attached(use_rslora=rslora)
    with torch.no_grad():
        logits = att.model(X)
    merged = tiny()
    with torch.no_grad():
        for number, block in enumerate(merged.blocks):
            a, b = factors(att, number)
            block.attn.qkv.weight[:24] += scale * b[:24, :2] @ a[:2]
            block.attn.qkv.weight[48:] += scale * b[48:, 2:] @ a[2:]
            torch.testing.assert_close(merged(X), logits, atol=1e-4, rtol=1e-4) if number == 1 else None
    assert att.counts.tuned == 2 * 2 * (2 * 24 + 2 * 24)


def test_the_other_rows_stay_zero_whatever_the_optimizer() -> None:
    att = attached()
    optimizer = torch.optim.SGD(att.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(att.model(X), torch.tensor([0, 1])).backward()
        optimizer.step()
    _, b = factors(att, 0)
    with torch.no_grad():
        b += 1.0  # an optimizer that mixes entries
    before = att.model.blocks[0].attn.qkv.base_layer.weight.clone()
    att.model(X)
    assert not b[24:48].any()
    assert not b[:24, 2:].any()
    assert b[:24, :2].all()
    att.merge()
    assert torch.equal(att.model.blocks[0].attn.qkv.weight[24:48], before[24:48])
    assert not torch.equal(att.model.blocks[0].attn.qkv.weight[48:], before[48:])


def test_peft_loads_what_was_saved(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    att = attached(["q", "v"])
    with torch.no_grad():
        logits = att.model(X)
        att.save(tmp_path)
        theirs = peft.PeftModel.from_pretrained(tiny(), tmp_path).eval()
        torch.testing.assert_close(theirs(X), logits)
        torch.testing.assert_close(petune.load(tiny(), tmp_path).model(X), logits)


def test_contract_and_layers_of_their_own() -> None:
    petune.check_tuner("lora", targets="q,v")
    att = petune.attach(tiny_models()["transformers"](), "lora", targets="q,v", r=2)
    assert {key.split(".")[-4] for key in att.tuned} == {"q_proj", "v_proj"}
    assert att.counts.tuned == 2 * 2 * (2 * 24 + 2 * 24)


@pytest.mark.parametrize("library", sorted(tiny_models()))
def test_qkv_is_the_attention_without_its_last_layer(library: str) -> None:
    att = petune.attach(tiny_models()[library](), "lora", targets="qkv", r=2)
    per_layer = 2 * (24 + 72) if library != "transformers" else 3 * 2 * (24 + 24)
    assert att.counts.tuned == 2 * per_layer


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("dora", {"targets": "q,v"}, "dora changes whole layers, but blocks.0.attn.qkv makes more than q,v"),
        ("peft:ia3", {"targets": "q"}, "ia3 changes whole layers"),
        ("lora", {"targets": "q,v", "rank_pattern": {"qkv": 3}}, "rank_pattern goes with whole layers"),
    ],
)
def test_types_that_change_whole_layers_are_refused(method: str, options: dict[str, object], message: str) -> None:
    model = tiny()
    before = copy.deepcopy(model).state_dict()
    with pytest.raises(AttachError, match=message):
        petune.attach(model, method, **options)
    assert list(model.state_dict()) == list(before)


@pytest.mark.filterwarnings("ignore:The following:RuntimeWarning")  # PEFT follows patterns of parameters after all
@pytest.mark.parametrize(("rslora", "scale"), [(False, 4 / 2), (True, 4 / 2**0.5)])
def test_q_and_v_of_torchs_attention(tmp_path: Path, rslora: bool, scale: float) -> None:
    build = tiny_models()["torchvision"]
    att = randomised(petune.attach(build(), "lora", targets="q,v", r=2, lora_alpha=4, use_rslora=rslora))
    merged = build()
    pairs = list(att.tuned.values())[:4]
    with torch.no_grad():
        for block, a, b in zip(merged.encoder.layers, pairs[::2], pairs[1::2], strict=True):
            block.self_attention.in_proj_weight[:24] += scale * b[:24, :2] @ a[:2]
            block.self_attention.in_proj_weight[48:] += scale * b[48:, 2:] @ a[2:]
        logits = att.model(X)
        torch.testing.assert_close(merged(X), logits, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(build()(X), logits, atol=1e-3)
        att.save(tmp_path)
        torch.testing.assert_close(petune.load(build(), tmp_path).model(X), logits)
        theirs = pytest.importorskip("peft").PeftModel.from_pretrained(build(), tmp_path).eval()
        torch.testing.assert_close(theirs(X), logits)
    assert att.counts.tuned == 2 * 2 * (2 * 24 + 2 * 24)


def test_torchs_attention_with_dropout_and_unknown_parts_are_refused() -> None:
    with pytest.raises(AttachError, match="reads the weights of q, k and v without calling"):
        petune.attach(tiny_models()["torchvision"](), "lora", targets="q,v", lora_dropout=0.1)
    with pytest.raises(ConfigError, match="targets"):
        petune.attach(tiny(), "lora", targets="q,w")
