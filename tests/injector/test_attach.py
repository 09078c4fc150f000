"""attach: what trains, what stays frozen, and that nothing is left after a failure or detach."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import petune
from petune.base.errors import AttachError, ConfigError, DeadSite, NotMergeable, SiteNotFound, UnknownName
from tests.sampling import sampled
from tests.tiny import X, randomised, tiny

METHODS = ["adaptformer", "vpt", "linear", "full"]


def steps(att: petune.Attachment, number: int = 3) -> None:
    optimizer = torch.optim.SGD(att.parameters(), lr=0.1)
    att.train()
    for _ in range(number):
        optimizer.zero_grad()
        nn.functional.cross_entropy(att.model(X), torch.tensor([0, 1])).backward()
        optimizer.step()


class Custom(petune.Tuner[petune.TunerConfig]):
    """A tuner that calls a function."""

    def __init__(self, edit_model: Callable[[petune.Edit], None]) -> None:
        super().__init__()
        self.edit_model = edit_model

    def attach(self, edit: petune.Edit) -> None:
        self.edit_model(edit)


class Shift(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


def snapshot(model: nn.Module) -> tuple[object, ...]:
    return (
        {key: t.clone() for key, t in model.state_dict().items()},
        [(n, p.requires_grad) for n, p in model.named_parameters()],
        [(n, m.training) for n, m in model.named_modules()],
        [
            (n, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(set(m.__dict__) - {"training"}))
            for n, m in model.named_modules()
        ],
    )


def same(a: tuple[object, ...], b: tuple[object, ...]) -> bool:
    (states_a, *rest_a), (states_b, *rest_b) = a, b
    assert isinstance(states_a, dict)
    assert isinstance(states_b, dict)
    equal = list(states_a) == list(states_b) and all(torch.equal(states_a[k], states_b[k]) for k in states_a)
    return equal and rest_a == rest_b


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:full leaves 1 parameter")
def test_detach_leaves_nothing(method: str) -> None:
    model = tiny()
    model.norm.weight.requires_grad_(False)
    model.blocks[1].train()
    before, plain = snapshot(model), model.eval()(X)
    model.blocks[1].train()
    att = petune.attach(model, method)
    steps(att)
    model.eval()  # as it was: the root's mode is the same, so each module's own comes back
    att.detach()
    assert same(snapshot(model), before)
    assert torch.equal(model.eval()(X), plain)
    with pytest.raises(AttachError, match="was detached"):
        att.detach()


def test_modes_follow_train_and_eval_after_detach() -> None:
    model = tiny().train()
    att = petune.attach(model, "adaptformer")
    model.eval()
    att.detach()
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("method", METHODS)
def test_frozen_tensors_and_buffers_stay_and_tuned_move(method: str) -> None:
    model = tiny()
    att = petune.attach(model, method)
    state = {key: t.clone() for key, t in model.state_dict().items()}
    steps(att)
    trained = {*att.tuned, *att.head}
    for key, t in model.state_dict().items():
        assert torch.equal(t, state[key]) == (key not in trained), key


def test_frozen_batchnorm_keeps_its_statistics() -> None:
    model = timm.create_model("resnet10t", num_classes=5).eval()
    att = petune.attach(model, "linear", input_size=(3, 32, 32))
    buffers = {key: b.clone() for key, b in model.named_buffers()}
    att.train()
    model(torch.randn(4, 3, 32, 32))
    assert all(torch.equal(b, buffers[key]) for key, b in model.named_buffers())
    full = petune.attach(timm.create_model("resnet10t", num_classes=5), "full", input_size=(3, 32, 32))
    full.train()
    before = {key: b.clone() for key, b in full.model.named_buffers()}
    full.model(torch.randn(4, 3, 32, 32))
    assert any(not torch.equal(b, before[key]) for key, b in full.model.named_buffers())


def test_freezing_is_by_identity_and_not_by_name() -> None:
    model = tiny()
    model.blocks[1].mlp.fc2.weight = model.blocks[0].mlp.fc2.weight  # shared between blocks
    att = petune.attach(model, "adaptformer")
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in att.parameters()}


def test_backbone_keys_keep_their_names() -> None:
    model = tiny()
    keys = list(model.state_dict())
    att = petune.attach(model, "adaptformer")
    assert [k for k in model.state_dict() if k not in att.tuned] == keys


def test_without_the_head() -> None:
    att = petune.attach(tiny(), "adaptformer", train_head=False)
    assert att.head == {}
    assert att.counts.head == 0
    assert not att.model.head.weight.requires_grad
    headless = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1)
    with pytest.raises(SiteNotFound, match="classifier"):
        petune.attach(headless, "adaptformer")
    assert petune.attach(headless, "adaptformer", train_head=False).counts.head == 0
    with pytest.raises(petune.AttachError, match=r"train nothing.*train_head=True"):
        petune.attach(tiny(), "linear", train_head=False)


FAILURES: dict[str, tuple[Callable[[petune.Edit], None], type[Exception], str]] = {
    "the tuner raises": (lambda edit: 1 / 0, ZeroDivisionError, "division"),
    "a site is missing": (lambda edit: edit.after(replace(edit.sites, parts={}).norm, Shift(24)), SiteNotFound, "norm"),
    "a module is no site": (lambda edit: edit.after(edit.model.norm, Shift(24)), AttachError, "takes a site"),
    "a tensor between modules is changed": (
        lambda edit: edit.after(edit.sites.blocks[0].mid, Shift(24)),
        AttachError,
        "replace it with stream",
    ),
    "an adapter is never called": (
        lambda edit: edit.after(edit.site(edit.model.unused), Shift(24)),
        DeadSite,
        "would do nothing",
    ),
    "prompts without a number": (lambda edit: edit.prompt(edit.sites.blocks, Shift(24)), AttachError, "num_prompts"),
    "a wrong shape": (lambda edit: edit.after(edit.sites.blocks[0], nn.Linear(24, 7)), AttachError, "returned shape"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_attach_leaves_the_model_as_it_was(failure: str) -> None:
    edit_model, error, message = FAILURES[failure]
    model = tiny()
    model.unused = nn.Linear(24, 24)
    before = snapshot(model)

    def first_something(edit: petune.Edit) -> None:
        edit.after(edit.sites.blocks[0].attn, Shift(24))
        edit.prompt(edit.sites.blocks[0], Prompt())
        edit.train(edit.sites.blocks[1])
        edit_model(edit)

    with pytest.raises(error, match=message):
        petune.attach(model, Custom(first_something))
    assert same(snapshot(model), before)


class Prompt(nn.Module):
    num_prompts = 2

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(1, 2, 24))

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens


def test_a_parameter_without_gradient_is_named() -> None:
    class Half(Shift):
        def __init__(self, dim: int) -> None:
            super().__init__(dim)
            self.unused = nn.Parameter(torch.zeros(3))

    att = petune.attach(tiny(), Custom(lambda edit: edit.after(edit.sites.blocks[0], Half(24))))
    att.train()
    att.model(X).sum().backward()
    with pytest.raises(DeadSite, match=r"no gradient.* blocks\.0\.petune_custom\.adapter\.unused"):
        att.check_gradients()


def test_disabled_is_the_backbone_bit_for_bit_and_nests() -> None:
    model = tiny()
    plain = model(X)
    att = petune.attach(model, "adaptformer")
    steps(att)
    model.eval()
    tuned = model(X)
    with att.disabled():
        assert torch.equal(model(X), plain)
    assert torch.equal(model(X), tuned)
    with pytest.raises(ValueError, match="in between"), att.disabled():
        raise ValueError("in between")
    assert torch.equal(model(X), tuned)


def test_two_attachments_need_two_names() -> None:
    model = tiny()
    petune.attach(model, "adaptformer")
    with pytest.raises(AttachError, match=r"'adaptformer' is attached .* name="):
        petune.attach(model, "adaptformer")
    second = petune.attach(model, "adaptformer", name="other")
    assert second.tuned.keys().isdisjoint({"blocks.0.petune_adaptformer.adapter.up.weight"})
    assert model.blocks[0].petune_adaptformer.adapter.up.weight.requires_grad


def test_not_mergeable_says_why() -> None:
    att = petune.attach(tiny(), "adaptformer")
    with pytest.raises(NotMergeable, match="ReLU is not linear"):
        att.merge()
    assert att.attached


def test_wrong_methods_and_options() -> None:
    with pytest.raises(UnknownName, match="Did you mean adaptformer"):
        petune.attach(tiny(), "adaptformr")
    with pytest.raises(ConfigError, match=r"no such key: bottlneck\. Did you mean bottleneck"):
        petune.attach(tiny(), "adaptformer", bottlneck=3)
    with pytest.raises(ConfigError, match="deep is given twice"):
        petune.attach(tiny(), "vpt:deep=false", deep=True)
    with pytest.raises(AttachError, match="input_size"):
        petune.attach(nn.Sequential(nn.Linear(3, 3)), "linear")


def test_options_in_the_name_of_the_method() -> None:
    att = petune.attach(tiny(), "vpt:deep=false,num_prompts=3")
    assert att.name == "vpt"
    assert att.tuner.config.model_dump().items() >= {"deep": False, "num_prompts": 3}.items()


def test_a_model_without_attention_is_refused_by_block_methods_only() -> None:
    resnet = timm.create_model("resnet10t", num_classes=5)
    with pytest.raises(SiteNotFound, match="no attention block"):
        petune.attach(resnet, "adaptformer", input_size=(3, 32, 32))
    assert petune.attach(resnet, "linear", input_size=(3, 32, 32)).counts.tuned == 0


def test_what_a_backbone_never_uses_may_stay_as_it_is() -> None:
    model = tiny()
    model.mask_token = nn.Parameter(torch.zeros(24))
    att = petune.attach(model, "full")
    before = model.mask_token.clone()
    steps(att)
    att.check_gradients()
    assert torch.equal(model.mask_token, before)
    unused = tiny()
    unused.mask_token = nn.Parameter(torch.zeros(24))
    with pytest.raises(DeadSite, match=r"learn nothing at mask_token"):
        petune.attach(unused, Custom(lambda edit: edit.train([edit.model.mask_token])))


def test_an_adapter_that_does_nothing_is_an_error() -> None:
    class Off(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0 * super().forward(x)

    method = Custom(lambda edit: edit.parallel(edit.sites.blocks[0], edit.sites.blocks[0], Off(24, 24)))
    for train_head in (False, True):
        att = petune.attach(tiny(), method, train_head=train_head)
        steps(att)
        att.check_gradients()
        with pytest.raises(DeadSite, match=r"all gradients are zero \(2 tensors\)"):
            att.check_gradients(under_way=True)
    for p in att.head.values():
        p.grad = torch.zeros_like(p)  # the loss is exactly zero: everything is learned
    att.check_gradients(under_way=True)
    live = petune.attach(tiny(), "adaptformer")
    steps(live)
    live.check_gradients(under_way=True)


KEEP_NOTHING = ["lora", "fact", "vpt", "vpt:deep=false", "adaptformer", "lst"]


@pytest.mark.parametrize("method", sampled(KEEP_NOTHING, {"lora", "vpt", "adaptformer"}.__contains__))
def test_no_activation_is_kept(method: str) -> None:
    """An attachment holds no activations of the forwards that attaching ran."""

    def held_elsewhere(model: nn.Module) -> int:
        gc.collect()
        own = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
        tensors = [t for t in gc.get_objects() if issubclass(type(t), Tensor)]
        others = [t for t in tensors if not isinstance(t, FakeTensor) and t.data_ptr() not in own]  # fakes hold nothing
        return sum(t.numel() for t in others if t.ndim > 1)

    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, patch_size=2, window_size=4, embed_dim=24, depths=(2, 2),
        num_heads=(2, 4), num_classes=3,
    ) if method == "vpt" else tiny()  # fmt: skip
    before = held_elsewhere(model)
    att = petune.attach(model, method)
    assert held_elsewhere(model) - before <= sum(p.numel() for p in att.head.values())  # the head's values from before


def test_a_method_that_finds_nothing_to_train_is_refused() -> None:
    model = tiny()
    before = snapshot(model)
    with pytest.raises(AttachError, match="nothing to train"):
        petune.attach(model, Custom(lambda edit: None))
    assert same(snapshot(model), before)


def test_what_was_replaced_is_named() -> None:
    model = tiny()
    att = petune.attach(model, "adaptformer")
    model.load_state_dict({key: t.clone() for key, t in model.state_dict().items()}, assign=True)
    for use in (att.parameters, att.check_gradients, lambda: att.save("nowhere")):
        with pytest.raises(AttachError, match=r"10 tensors.* blocks\.0\.petune_adaptformer"):
            use()
    again = tiny()
    att = petune.attach(again, "adaptformer")
    again.reset_classifier(7)
    with pytest.raises(AttachError, match=r"2 tensors.* head\.weight, head\.bias"):
        att.parameters()
    with pytest.raises(AttachError, match="head is another module"):
        petune.attach(again, "linear")


def test_sites_of_another_model_are_refused() -> None:
    with pytest.raises(AttachError, match="not this model's"):
        petune.attach(tiny(), "linear", sites=petune.find_sites(tiny()))


def test_a_model_without_weights_is_refused() -> None:
    with pytest.raises(AttachError, match="no parameters"):
        petune.attach(nn.Flatten(), "linear", input_size=(3, 16, 16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", ["adaptformer", "vpt"])
def test_adapters_have_the_number_format_of_the_model(dtype: torch.dtype, method: str) -> None:
    model = tiny().to(dtype)
    att = petune.attach(model, method)
    assert {p.dtype for p in att.parameters()} == {dtype}
    assert model(X.to(dtype)).dtype == dtype


def test_merging_a_model_with_state_of_its_own() -> None:
    class Own(nn.Module):
        image_size = 16

        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny()

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.inner(x)
            return logits

        def get_extra_state(self) -> dict[str, int]:
            return {"version": 1}

        def set_extra_state(self, state: dict[str, int]) -> None: ...

    model = Own().eval()
    att = randomised(petune.attach(model, "lora"))
    expected = model(X)
    att.merge()
    assert not att.attached
    torch.testing.assert_close(model(X), expected, atol=1e-4, rtol=1e-4)


def test_a_second_set_of_prompts_is_refused_for_what_it_is() -> None:
    model = tiny()
    first = petune.attach(model, "vpt")
    with pytest.raises(AttachError, match="has prompts of another attachment"):
        petune.attach(model, "vpt", name="other")
    first.disable()
    petune.attach(model, "vpt", name="other")
