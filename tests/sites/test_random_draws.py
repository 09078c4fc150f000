"""Which modules draw random numbers in training, whatever a library calls them."""

from __future__ import annotations

import torch
import torchvision
import transformers
from torch import nn

from petune.sites.input_spec import InputSpec
from petune.sites.random_draws import find_random_draws
from tests.tiny import tiny

SIZE = (3, 16, 16)


def _drawing(model: nn.Module) -> list[str]:
    return sorted({type(module).__name__ for module in find_random_draws(model, InputSpec.of_size(SIZE)).drawing})


def test_a_rate_of_zero_draws_nothing() -> None:
    assert _drawing(tiny()) == []


def test_timm() -> None:
    assert _drawing(tiny(drop_path_rate=0.1)) == ["DropPath"]
    assert _drawing(tiny(attn_drop_rate=0.1)) == ["Attention"]  # a rate in a call, not a module
    assert _drawing(tiny(drop_rate=0.1)) == ["Dropout"]
    assert _drawing(tiny(patch_drop_rate=0.3)) == ["PatchDropout"]


def test_the_blocks_around_drop_path_are_named() -> None:
    model = tiny(drop_path_rate=0.1)
    around = find_random_draws(model, InputSpec.of_size(SIZE)).around
    assert model.blocks[1] in around
    assert model.blocks[0] not in around  # drop path rises from zero in the first block


def test_torchvision() -> None:
    model = torchvision.models.VisionTransformer(16, 4, 2, 2, 24, 48, dropout=0.1, attention_dropout=0.1)
    assert _drawing(model) == ["Dropout", "MultiheadAttention"]


def test_transformers() -> None:
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    shape |= {"image_size": 16, "patch_size": 4}
    config = transformers.ViTConfig(**shape, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    assert {"Dropout"} < set(_drawing(transformers.ViTForImageClassification(config)))
    beit = transformers.BeitForImageClassification(transformers.BeitConfig(**shape))
    assert _drawing(beit) == ["BeitDropPath"]  # its default is a rate of 0.1


def test_the_search_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3 * 16 * 16), nn.Dropout(0.5), nn.Linear(3 * 16 * 16, 2)).train()
    model[1].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert _drawing(model) == ["Dropout"]
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model] == [True, False, True, True]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
