"""q, k and v of torch's own `nn.MultiheadAttention`, which makes them without calling a layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petune
from petune.base.errors import AttachError, NotMergeable
from petune.plugin_dev.tiny_models import tiny_torchvision
from tests.injector.test_attention import with_frozen, with_keys
from tests.injector.test_edit import Custom, Times
from tests.tiny import X


class EncoderModel(nn.Module):
    """Blocks of torch, which run one fused kernel in eval mode where no module in them has a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 4, 4)
        options: dict[str, Any] = {"batch_first": True, "norm_first": True, "activation": "gelu"}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(24, 2, 48, **options) for _ in range(2))
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def encoder_model() -> nn.Module:
    torch.manual_seed(0)
    return EncoderModel().eval()


def attentions(model: nn.Module) -> list[nn.MultiheadAttention]:
    return [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]


def change_q_and_v(edit: petune.Edit) -> None:
    for block in edit.sites.blocks:
        attention = edit.attention(block)
        edit.after(attention.q, Times(3.0))
        edit.parallel(attention.v, attention.v, nn.Linear(24, 24, bias=False))


def scale(name: str) -> Callable[[petune.Edit], None]:
    def change(edit: petune.Edit) -> None:
        for block in edit.sites.blocks:
            edit.after(getattr(edit.attention(block), name), Times(3.0))

    return change


def attached(model: nn.Module, change: Callable[[petune.Edit], None], name: str = "parts") -> petune.Attachment:
    return petune.attach(model, Custom(change), name=name, input_size=(3, 16, 16))


@pytest.mark.parametrize("build", [tiny_torchvision, encoder_model])
def test_q_and_v_change_alone_as_their_weights_would(build: Callable[[], nn.Module]) -> None:
    model, expected = build(), build()
    att = attached(model, change_q_and_v)
    layers = [p for key, p in att.tuned.items() if key.endswith("weight")]
    with torch.no_grad():
        for attention, weight in zip(attentions(expected), layers, strict=True):
            attention.in_proj_weight[:24] *= 3
            attention.in_proj_bias[:24] *= 3
            attention.in_proj_weight[48:] += weight
        torch.testing.assert_close(model(X), expected(X))  # without gradients, where torch has its fast path
    torch.testing.assert_close(model(X), expected(X))


@pytest.mark.parametrize("build", [tiny_torchvision, encoder_model])
def test_disabled_and_detached_it_is_torchs_attention_to_the_bit(build: Callable[[], nn.Module]) -> None:
    model = build()
    names, before = [name for name, _ in model.named_modules()], model(X)
    att = attached(model, change_q_and_v)
    assert [key for key in model.state_dict() if key not in att.tuned] == list(build().state_dict())
    with att.disabled():
        assert torch.equal(model(X), with_frozen(build(), model)(X))
    assert not torch.allclose(model(X), before)
    with pytest.raises(NotMergeable):
        att.merge()
    att.detach()
    assert torch.equal(model(X), before)
    assert [name for name, _ in model.named_modules()] == names
    assert not [m for m in model.modules() if "forward" in vars(m)]


MASK, PADDING = torch.rand(5, 5) < 0.3, torch.tensor([[False] * 4 + [True], [False] * 5])
CALLS = [
    {},
    {"need_weights": False},
    {"average_attn_weights": False},
    {"attn_mask": MASK.fill_diagonal_(False)},
    {"attn_mask": torch.randn(4, 5, 5), "need_weights": False},
    {"attn_mask": torch.randn(5, 5), "key_padding_mask": PADDING.float() * -9.0},
    {"key_padding_mask": PADDING, "need_weights": False},
    {"attn_mask": nn.Transformer.generate_square_subsequent_mask(5), "is_causal": True, "need_weights": False},
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_in_steps_it_is_torchs_attention(call: dict[str, Any], batch_first: bool) -> None:
    model = tiny_torchvision()
    attached(model, lambda edit: [edit.after(edit.attention(b).q, Times(1.0)) for b in edit.sites.blocks])
    attention = attentions(model)[0]
    plain = attentions(tiny_torchvision())[0]
    attention.batch_first = plain.batch_first = batch_first
    x, y = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    inputs = (x, y, y) if batch_first else (x.transpose(0, 1), y.transpose(0, 1), y.transpose(0, 1))
    for mine, theirs in zip(attention(*inputs, **call), plain(*inputs, **call), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_keys_of_its_own_width_and_what_cannot_be_done() -> None:
    model = tiny_torchvision()
    model.encoder.layers[0].self_attention = nn.MultiheadAttention(24, 2, kdim=24, vdim=24, batch_first=True)
    other = nn.MultiheadAttention(24, 2, add_bias_kv=True, batch_first=True)
    separate = model.encoder.layers[0].self_attention
    separate._qkv_same_embed_dim = False
    weights = separate.in_proj_weight.detach().chunk(3)
    separate.q_proj_weight, separate.k_proj_weight, separate.v_proj_weight = map(nn.Parameter, weights)
    separate.register_parameter("in_proj_weight", None)
    expected = copy.deepcopy(model)
    att = attached(model, scale("k"))
    with torch.no_grad():
        separate = attentions(expected)[0]
        separate.k_proj_weight *= 3
        separate.in_proj_bias[24:48] *= 3
        attentions(expected)[1].in_proj_weight[24:48] *= 3
        attentions(expected)[1].in_proj_bias[24:48] *= 3
        torch.testing.assert_close(model(X), expected(X))
    att.detach()
    model.encoder.layers[0].self_attention = other
    with pytest.raises(AttachError, match="bias_kv"):
        attached(model, scale("k"))
    assert not [m for m in model.modules() if "forward" in vars(m)]


@pytest.mark.parametrize("first", ["keys", "parts"])
@pytest.mark.parametrize("build", [tiny_torchvision, encoder_model])
def test_it_goes_with_more_keys_and_values_in_any_order(build: Callable[[], nn.Module], first: str) -> None:
    """q times 3 is q with weights times 3, also where tokens attend to further keys."""
    model, expected = build(), build()
    changes = {"keys": with_keys, "parts": scale("q")}
    for name in sorted(changes, key=lambda name: name != first):
        torch.manual_seed(1)
        attached(model, changes[name], name)
    torch.manual_seed(1)
    for attention in attentions(expected):
        with torch.no_grad():
            attention.in_proj_weight[:24] *= 3
            attention.in_proj_bias[:24] *= 3
    attached(expected, with_keys, "keys")
    with torch.no_grad():
        torch.testing.assert_close(model(X), expected(X))
        assert not torch.allclose(model(X), build()(X), atol=1e-3)


def test_keys_and_values_act_where_torch_would_run_one_kernel_for_a_block() -> None:
    model = encoder_model()
    with torch.no_grad():
        before = model(X)
        att = attached(model, with_keys, "keys")
        assert not torch.allclose(model(X), before, atol=1e-3)
        with att.disabled():
            assert torch.equal(model(X), before)
        assert not torch.allclose(model(X), before, atol=1e-3)
        att.detach()
        assert torch.equal(model(X), before)


def test_two_attachments_and_the_order_in_which_they_go() -> None:
    model = tiny_torchvision()
    first, second = attached(model, scale("q"), "first"), attached(model, scale("v"), "second")
    both = model(X)
    first.disable()
    one = model(X)
    first.enable()
    torch.testing.assert_close(model(X), both)
    first.detach()
    torch.testing.assert_close(model(X), one)
    second.detach()
    assert torch.equal(model(X), tiny_torchvision()(X))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("changes", [(change_q_and_v, with_keys), (with_keys, change_q_and_v)])
def test_copied_and_compiled(changes: tuple[Callable[[petune.Edit], None], ...]) -> None:
    model = tiny_torchvision()
    att = attached(model, lambda edit: [change(edit) for change in changes])
    expected = model(X)
    torch.testing.assert_close(torch.compile(model, backend="eager")(X), expected)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in att.tuned.values():
            p.zero_()
    torch.testing.assert_close(other(X), expected)
    assert not torch.allclose(model(X), expected)


def test_save_and_load(tmp_path: Any) -> None:
    model = tiny_torchvision()
    att = petune.attach(model, "lora", targets="q,v", r=2)
    before = model(X)
    att.save(tmp_path)
    torch.testing.assert_close(petune.load(tiny_torchvision(), tmp_path).model(X), before)
