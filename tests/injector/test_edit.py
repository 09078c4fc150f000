"""Edit: what authors see of it, and what the verbs do to layers that a forward reads without calling."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

import petune
from petune.base.errors import AttachError, DeadSite
from tests.tiny import tiny

READ_QKV = ["beit_base_patch16_224", "eva02_tiny_patch14_224", "swinv2_tiny_window8_256"]


class Custom(petune.Tuner[petune.TunerConfig]):
    """A tuner made of a function."""

    def __init__(self, change: Callable[[petune.Edit], None]) -> None:
        super().__init__()
        self.change = change

    def attach(self, edit: petune.Edit) -> None:
        self.change(edit)


class Add(nn.Module):
    """x + number, trained."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.value


class Times(Add):
    """x · number, trained."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.value


def reads_qkv(name: str) -> nn.Module:
    swin = {"window_size": 4, "depths": [2], "num_heads": [2]}
    sizes = swin if name.startswith("swin") else {"patch_size": 16, "depth": 2, "num_heads": 2}
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, img_size=64, num_classes=3, embed_dim=24, **sizes)
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model.eval()


def test_what_authors_see_fits_a_screen() -> None:
    names = [name for name in dir(petune.Edit) if not name.startswith("_")]
    assert names == [
        "add_parameters", "after", "around", "attention", "backbone", "before", "called", "input_linears",
        "keys_values", "linear_layers", "on_detach", "on_merge", "on_toggle", "parallel", "prompt",
        "prompt_span", "routed", "side", "site", "stream", "token_grid", "train", "uncalled_linears", "use_qkv_module",
        "used",
    ]  # fmt: skip


@pytest.mark.parametrize("verb", ["before", "after", "parallel"])
@pytest.mark.parametrize("name", READ_QKV)
def test_an_adapter_at_a_qkv_layer_lets_the_attention_call_it(name: str, verb: str) -> None:
    model = reads_qkv(name)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))

    def change(edit: petune.Edit) -> None:
        for block in edit.sites.blocks:
            (qkv,) = (s for s in edit.linear_layers(block.attn) if s.role == "qkv")
            adapter = nn.Linear(24, 72) if verb == "parallel" else Add(0.5)
            edit.parallel(qkv, qkv, adapter) if verb == "parallel" else getattr(edit, verb)(qkv, adapter)

    with torch.no_grad():
        plain = model(x)
        att = petune.attach(model, Custom(change))
        assert not torch.allclose(model(x), plain, atol=1e-4)
        with att.disabled():
            assert torch.equal(model(x), plain)
        att.detach()
        assert torch.equal(model(x), plain)


@pytest.mark.parametrize("name", READ_QKV)
def test_looking_for_layers_changes_nothing(name: str) -> None:
    model = reads_qkv(name)
    seen: list[str] = []

    def look(edit: petune.Edit) -> None:
        attention = edit.sites.blocks[0].attn
        seen.extend(site.role for site in edit.linear_layers(attention))
        assert not [m for m in model.modules() if getattr(m, "qkv_bias_separate", False)]
        edit.after(attention, Add(0.0))

    petune.attach(model, Custom(look))
    assert "qkv" in seen
    assert not [m for m in model.modules() if getattr(m, "qkv_bias_separate", False)]


def test_a_layer_that_is_read_by_other_code_is_still_refused() -> None:
    from petune.plugin_dev.tiny_models import tiny_torchvision

    def change(edit: petune.Edit) -> None:
        (layer, *_) = edit.uncalled_linears(edit.sites.blocks[0].attn)
        edit.after(layer, Add(0.5))

    with pytest.raises(DeadSite, match="would do nothing"):
        petune.attach(tiny_torchvision(), Custom(change))


def test_train_returns_what_trains_now() -> None:
    model = tiny()
    first = petune.attach(model, "adaptformer")
    trained: list[nn.Parameter] = []
    petune.attach(model, Custom(lambda edit: trained.extend(edit.train(edit.sites.blocks[0]))))
    others = {id(p) for p in first.tuned.values()}
    expected = [p for p in model.blocks[0].parameters() if id(p) not in others]
    assert [id(p) for p in trained] == [id(p) for p in expected]


VERBS: dict[str, Callable[[petune.Edit, petune.Block], object]] = {
    "after": lambda edit, block: edit.after(block.mlp, Add(0.5)),
    "around": lambda edit, block: edit.around(block, Add(0.5)),
    "prompt": lambda edit, block: edit.prompt(block, Add(0.5)),
    "train": lambda edit, block: edit.train(block),
    "token_grid": lambda edit, block: edit.token_grid(),
    "on_detach": lambda edit, block: edit.on_detach(print),
    "attention": lambda edit, block: edit.attention(block),
}
"""The last one only looks, and is not refused."""


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_after_detach_leaves_nothing_on_the_model(verb: str) -> None:
    model = tiny()
    edits: list[petune.Edit] = []

    def change(edit: petune.Edit) -> None:
        edits.append(edit)
        edit.after(edit.sites.blocks[0], Add(0.5))

    keys, hooks = [*vars(model)], [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    petune.attach(model, Custom(change)).detach()
    refused: contextlib.AbstractContextManager[object] = (
        contextlib.nullcontext() if verb == "attention" else pytest.raises(AttachError, match="after detach")
    )
    with refused:
        VERBS[verb](edits[0], edits[0].sites.blocks[0])
    assert [*vars(model)] == keys
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all(p.requires_grad for p in model.parameters())
    assert [path for path, _ in model.named_modules()] == [path for path, _ in tiny().named_modules()]
