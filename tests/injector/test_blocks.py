"""The option `blocks` of every tuner: what it chooses trains, is saved and loaded, and nothing below it is computed."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import petune
from petune.base.block_choice import chosen_indices
from tests.sampling import sampled
from tests.tiny import X, randomised, tiny

DEPTH = 4
METHODS = [
    "adaptformer:bottleneck=4", "bitfit", "norm", "partial", "vpt:num_prompts=3", "vpt:num_prompts=3,deep=false",
    "lora", "fact:rank=2", "houlsby:bottleneck=4", "pfeiffer:bottleneck=4", "repadapter", "lst", "peft:ln_tuning",
    "peft:ia3", "peft:adalora", "ssf", "convpass:hidden_dim=2",
]  # fmt: skip
SAMPLE = {"adaptformer:bottleneck=4", "bitfit", "vpt:num_prompts=3,deep=false", "convpass:hidden_dim=2"}
"""Methods that every run of the tests tries."""
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # PEFT's own, about timm's norms


def blocks_of(att: petune.Attachment) -> set[int]:
    return {int(key.split("blocks.")[1].split(".")[0]) for key in att.tuned if "blocks." in key}


def test_choices_name_blocks() -> None:
    numbers = list(range(12))
    for choice, expected in (
        ("all", numbers),
        ("last:3", [9, 10, 11]),
        ("first:2", [0, 1]),
        ("every:5", [0, 5, 10]),
        ([5, 0, -1, 5], [0, 5, 11]),
    ):
        assert chosen_indices(choice, numbers, "ViT") == expected
    assert chosen_indices([-1, 7], [3, 5, 7], "ViT") == [7]  # sites that were chosen before
    for choice in ("last:13", "every:13", [12], [-13], "last:0", "last", "some", [], [True], 3, "first:-1"):
        with pytest.raises(petune.ConfigError, match="blocks"):
            chosen_indices(choice, numbers, "ViT")  # type: ignore[arg-type]
    with pytest.raises(petune.ConfigError, match="12 blocks"):
        chosen_indices("last:13", numbers, "ViT")


def test_wrong_choices_are_refused_and_leave_the_model_alone() -> None:
    model = tiny(depth=DEPTH)
    before = [*model.state_dict()]
    for choice in ("last:5", "last", "[4]", "[]", "3", "[a]"):
        with pytest.raises(petune.ConfigError, match="blocks") as error:
            petune.attach(model, f"adaptformer:blocks={choice}")
        assert "4 blocks" in str(error.value) or "last:K" in str(error.value)
    with pytest.raises(petune.ConfigError, match="num_blocks and blocks"):
        petune.attach(model, "partial:blocks=last:2,num_blocks=2")
    with pytest.raises(petune.AttachError, match="edits no block"):
        petune.attach(model, "linear", blocks="last:2")
    for method in ("full", "l2sp", "adaptformer:train_backbone=true"):
        with pytest.raises(petune.AttachError, match="does not follow blocks"):
            petune.attach(model, method, blocks="last:2")
    with pytest.raises(petune.AttachError, match="no neighbor"):
        petune.attach(model, "vpt:deep=false,blocks=[0,2]")
    assert [*model.state_dict()] == before


@pytest.mark.parametrize("choice", ["first:1", "last:1"])
@pytest.mark.parametrize("method", ["norm", "bitfit"])
def test_a_norm_of_all_blocks_is_refused_where_blocks_are_left_out(method: str, choice: str) -> None:
    model = tiny(depth=DEPTH)
    for block in model.blocks:
        block.norm1 = model.blocks[0].norm1
    with pytest.raises(petune.AttachError, match="does not follow blocks"):
        petune.attach(model, method, blocks=choice)


@pytest.mark.parametrize("method", sampled(METHODS, lambda method: method in SAMPLE))
def test_every_method_follows_blocks(method: str, tmp_path: Path) -> None:
    base = tiny(depth=DEPTH)
    for choice, expected in (("last:2", {2, 3}), ("first:2", {0, 1})):
        att = randomised(petune.attach(copy.deepcopy(base), method, blocks=choice))
        tuned = blocks_of(att)
        assert tuned == expected or (tuned < expected and method.startswith(("vpt:num_prompts=3,deep", "lst")))
        assert att.tuner.num_parameters(att.sites) in (None, att.counts.tuned)
        att.save(tmp_path / choice[:4])
        loaded = petune.load(copy.deepcopy(base), tmp_path / choice[:4])
        assert [block.index for block in loaded.sites.blocks] == sorted(expected)
        with torch.no_grad():
            assert torch.equal(loaded.model(X), att.model(X))
        if choice == "last:2":
            check_backward_stops(loaded)


def check_backward_stops(att: petune.Attachment) -> None:
    """No gradient is computed in the two blocks below the lowest chosen one."""
    outputs: list[torch.Tensor] = []
    for block in att.sites.all_blocks:
        block.enter.register_forward_hook(functools.partial(lambda kept, module, args, y: kept.append(y), outputs))
    att.train()
    att.model(X).sum().backward()
    assert [y.requires_grad for y in outputs] == [False, False, outputs[2].requires_grad, True]
    with_gradient = [key for key, p in att.model.named_parameters() if p.grad is not None]
    assert set(with_gradient) <= {*att.tuned, *att.head}


def saved_bytes(method: str) -> int:
    att = petune.attach(tiny(depth=DEPTH), method)
    att.train()
    frozen = {p.data_ptr() for p in att.model.parameters()}
    sizes: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.data_ptr() not in frozen:
            sizes[x.data_ptr()] = x.nbytes
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = att.model(X)
    assert output.requires_grad
    return sum(sizes.values())


def test_a_step_keeps_activations_of_the_upper_blocks_only() -> None:
    assert saved_bytes("adaptformer:blocks=last:1") < 0.4 * saved_bytes("adaptformer")


def test_an_adapter_file_says_which_blocks(tmp_path: Path) -> None:
    att = petune.attach(tiny(depth=DEPTH), "adaptformer:blocks=every:2,bottleneck=4")
    assert blocks_of(att) == {0, 2}
    assert "blocks: 0, 2 of 4" in str(att)
    att.save(tmp_path / "a")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config.get("petune", config)["config"]["blocks"] == "every:2"
    with pytest.raises(petune.BackboneMismatch):
        petune.load(tiny(depth=6), tmp_path / "a")
    assert blocks_of(petune.attach(att.model, "houlsby", bottleneck=4)) == {0, 1, 2, 3}


def test_blocks_are_chosen_among_those_of_the_sites(tmp_path: Path) -> None:
    model = tiny(depth=DEPTH)
    sites = petune.find_sites(model).only(lambda block: block.index < 3)
    att = randomised(petune.attach(model, "adaptformer", blocks="last:2", bottleneck=4, sites=sites))
    assert blocks_of(att) == {1, 2}
    att.save(tmp_path / "a")
    loaded = petune.load(tiny(depth=DEPTH), tmp_path / "a")
    assert blocks_of(loaded) == {1, 2}
    with torch.no_grad():
        assert torch.equal(loaded.model(X), model(X))


class Towers(nn.Module):
    """Two encoders, of which one sees a smaller image; the classifier reads both."""

    def __init__(self) -> None:
        super().__init__()
        self.large: Any = tiny(depth=3)
        self.small: Any = tiny(1)
        for tower in (self.large, self.small):
            tower.reset_classifier(0)
        self.head = nn.Linear(48, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([self.large(x), self.small(-x)], 1))


def test_only_stays_in_one_tower(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Towers().eval()
    for method in ("bitfit", "lora:blocks=last:1"):
        model = copy.deepcopy(base)
        sites = petune.find_sites(model, (3, 16, 16)).only("small")
        att = randomised(petune.attach(model, method, sites=sites))
        assert att.tuned
        assert all(key.startswith("small.") for key in att.tuned), method
        path = tmp_path / method[:4]
        att.save(path)
        loaded = petune.load(copy.deepcopy(base), path)
        assert loaded.tuned.keys() == att.tuned.keys()
        with torch.no_grad():
            assert torch.equal(loaded.model(X), model(X))
    with pytest.raises(petune.SiteNotFound, match="large"):
        petune.find_sites(base, (3, 16, 16)).only("medium")
    with pytest.raises(petune.SiteNotFound):
        petune.find_sites(base, (3, 16, 16)).only(lambda block: False)


def test_blocks_without_a_site_are_left_out_only_when_asked() -> None:
    model: Any = tiny(depth=DEPTH)
    for index in (0, 2):
        model.blocks[index] = AttentionOnly(model.blocks[index])
    with pytest.raises(petune.SiteNotFound, match=r"\(0, 2\).*blocks=\[1, 3\]"):
        petune.attach(model, "pfeiffer:bottleneck=4")
    assert blocks_of(petune.attach(model, "pfeiffer:bottleneck=4,blocks=[1,3]")) == {1, 3}


class AttentionOnly(nn.Module):
    """The first half of a block."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.attn = block.norm1, block.attn

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return x + self.attn(self.norm1(x))


def test_merged_disabled_and_in_a_bank(tmp_path: Path) -> None:
    base = tiny(depth=DEPTH)
    att = randomised(petune.attach(copy.deepcopy(base), "lora:blocks=last:2"))
    with torch.no_grad():
        expected = att.model(X)
        with att.disabled():
            assert not torch.equal(att.model(X), expected)
        att.save(tmp_path / "lora")
        bank = petune.AdapterBank(copy.deepcopy(base))
        bank.load("a", tmp_path / "lora")
        torch.testing.assert_close(torch.stack(bank(X, ["a", "a"])), expected)
        att.merge()
        torch.testing.assert_close(att.model(X), expected, rtol=1e-3, atol=1e-4)
    modules = json.loads((tmp_path / "lora/adapter_config.json").read_text())["target_modules"]
    assert {path.split(".")[1] for path in modules} == {"2", "3"}  # PEFT wraps the same layers


def test_no_tuner_has_an_option_of_this_name() -> None:
    with pytest.raises(TypeError, match="blocks"):

        class Own(petune.TunerConfig):
            blocks: int = 3  # type: ignore[assignment]
