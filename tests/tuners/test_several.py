"""Several attachments on one model: stacked in any order; tasks by name; one batch for many tasks."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import petune
from petune.base.errors import AttachError, BackboneMismatch, UsageError
from petune.injector.registry import build_tuner
from petune.plugin_dev.tiny_models import tiny_timm
from tests.tiny import tiny

X = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def model(num_classes: int = 3) -> nn.Module:
    built = tiny_timm()
    built.reset_classifier(num_classes)
    torch.manual_seed(num_classes)
    nn.init.normal_(built.head.weight)
    nn.init.normal_(built.head.bias)
    return built.eval()


@torch.no_grad()
def logits(of: nn.Module, x: Tensor = X) -> Tensor:
    return of.eval()(x)


def step(*attachments: petune.Attachment) -> None:
    built = attachments[0].model
    built.train()
    params = {id(p): p for att in attachments for p in att.parameters()}
    optimizer = torch.optim.SGD(params.values(), lr=0.1)
    nn.functional.cross_entropy(built(X), torch.arange(len(X)) % 3).backward()
    for att in attachments:
        att.check_gradients()
    optimizer.step()
    optimizer.zero_grad()


STACKS = [("adaptformer", "bitfit"), ("bitfit", "adaptformer"), ("lora", "norm"), ("vpt", "lora"), ("bitfit", "lora")]


@pytest.mark.parametrize("stack", STACKS, ids="+".join)
@pytest.mark.parametrize("last_first", [True, False])
def test_stacked_train_together_and_come_off_in_any_order(stack: tuple[str, str], last_first: bool) -> None:
    built = model()
    plain, state = logits(built), copy.deepcopy(built.state_dict())
    atts = [petune.attach(built, name) for name in stack]
    before = [{k: p.detach().clone() for k, p in att.tuned.items()} for att in atts]
    for _ in range(3):
        step(*atts)
    for att, old in zip(atts, before, strict=True):
        assert all(p.requires_grad for p in att.parameters())
        assert any(not torch.equal(p, old[k]) for k, p in att.tuned.items())
    trained = {id(p) for att in atts for p in att.parameters()}
    assert all(p.requires_grad == (id(p) in trained) for p in built.parameters())
    for att in reversed(atts) if last_first else atts:
        att.detach()
    assert torch.equal(logits(built), plain)
    assert list(built.state_dict()) == list(state)
    assert all(p.requires_grad for p in built.parameters())
    assert not hasattr(built, "petune_trainable_state")
    assert not hasattr(built, "peft_config")


IN_TURN = [
    ("adaptformer", "bitfit"),
    ("bitfit", "adaptformer"),
    ("partial", "norm"),
    ("norm", "partial"),
    ("lora", "full"),
    ("bitfit", "adaptformer", "bitfit"),
    ("bitfit", "adaptformer", "full"),
    ("full", "lora", "bitfit"),
]


@pytest.mark.parametrize("stack", IN_TURN, ids="+".join)
def test_stacked_is_saved_and_loaded_in_turn(stack: tuple[str, ...], tmp_path: Path) -> None:
    built = model()
    names = [f"{method}{index}" for index, method in enumerate(stack)]
    atts = [petune.attach(built, method, name=name) for method, name in zip(stack, names, strict=True)]
    for _ in range(2):
        step(*atts)
    for att in atts:
        att.save(tmp_path / att.name)
    fresh = model()
    for name in names:
        petune.load(fresh, tmp_path / name, name=name)
    assert torch.equal(logits(fresh), logits(built))


def test_stacked_is_not_loaded_in_another_order(tmp_path: Path) -> None:
    built = model()
    atts = [petune.attach(built, name) for name in ("adaptformer", "bitfit")]
    step(*atts)
    for att in atts:
        att.save(tmp_path / att.name)
    fresh = model()
    petune.load(fresh, tmp_path / "bitfit")
    with pytest.raises(BackboneMismatch, match="in the order in which they were attached"):
        petune.load(fresh, tmp_path / "adaptformer")


def test_a_value_that_a_later_attachment_did_not_keep_is_an_error(tmp_path: Path) -> None:
    built = model()
    first = petune.attach(built, "adaptformer")
    petune.attach(built, "bitfit", keep_original=False)
    with pytest.raises(AttachError, match="keep_original=True"):
        first.save(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_counts_leave_others_out() -> None:
    built = model()
    single = petune.attach(model(), "bitfit").counts
    petune.attach(built, "adaptformer")
    stacked = petune.attach(built, "bitfit").counts
    assert (stacked.tuned, stacked.backbone) == (single.tuned, single.backbone)


def test_names_must_differ() -> None:
    built = model()
    petune.attach(built, "lora", name="a")
    petune.attach(built, "lora", name="b")
    with pytest.raises(AttachError, match="'a' is attached"):
        petune.attach(built, "linear", name="a")
    assert set(built.petune_trainable_state.attachments) == {"a", "b"}


METHODS = {
    "pets": ("adaptformer", 4, {}),
    "cars": ("adaptformer", 3, {"bottleneck": 5}),
    "vpt": ("vpt", 7, {"num_prompts": 2}),
    "vpt2": ("vpt", 2, {"num_prompts": 2}),
    "vpt3": ("vpt", 3, {"num_prompts": 4}),
    "shallow": ("vpt", 3, {"deep": False, "num_prompts": 2}),
    "lora": ("lora", 5, {}),
    "lora2": ("lora", 3, {"r": 2}),
    "probe": ("linear", 6, {}),
    "bitfit": ("bitfit", 3, {}),
    "houlsby": ("houlsby", 4, {}),
    "lst": ("lst", 3, {}),
    "ia3": ("peft:ia3", 4, {}),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every task trained alone, on the same backbone."""
    root = tmp_path_factory.mktemp("tasks")
    for name, (method, classes, options) in METHODS.items():
        torch.manual_seed(len(name))
        att = petune.attach(model(classes), method, **options)
        with torch.no_grad():
            for p in att.parameters():
                p.add_(torch.randn_like(p), alpha=0.2)
        att.save(root / name)
    return {name: root / name for name in METHODS}


def single_task(path: Path, name: str) -> nn.Module:
    built = model(METHODS[name][1])
    petune.load(built, path)
    return built


def test_tasks_by_name(saved: dict[str, Path]) -> None:
    built = model()
    plain, keys = logits(built), list(built.state_dict())
    bank = petune.AdapterBank(built)
    names = ["pets", "vpt", "lora", "bitfit", "lora2"]
    for name in names:
        bank.load(name, saved[name])
    for name in (*names, None, *reversed(names), None):
        expected = plain if name is None else logits(single_task(saved[name], name))
        assert torch.equal(logits(bank.use(name)), expected), name
    for name in names:
        bank.remove(name)
    assert torch.equal(logits(built), plain)
    assert list(built.state_dict()) == keys


@pytest.mark.parametrize("active", ["pets", None])
@torch.no_grad()
def test_classifiers_follow_a_model_that_moved(saved: dict[str, Path], active: str | None) -> None:
    bank = petune.AdapterBank(model())
    for name in ("pets", "vpt", "bitfit"):
        bank.load(name, saved[name])
    bank.use(active)
    bank.model.double()
    bank.use(None)
    mix = ["pets", None, "vpt", "bitfit", "pets"]
    for row, out in zip(mix, bank(X[:5].double(), mix), strict=True):
        expected = logits(model() if row is None else single_task(saved[row], row).eval(), X[:5])[mix.index(row)]
        if mix.count(row) == 1:
            torch.testing.assert_close(out.float(), expected, atol=1e-5, rtol=1e-5)
    for name in ("bitfit", "pets", "vpt"):
        torch.testing.assert_close(
            logits(bank.use(name), X.double()).float(), logits(single_task(saved[name], name)), atol=1e-5, rtol=1e-5
        )
        bank.remove(name)
    torch.testing.assert_close(logits(bank.model, X.double()).float(), logits(model()), atol=1e-5, rtol=1e-5)


MIXES = [
    ("pets", "cars", None),
    ("lora", "lora2", None),
    ("vpt", "vpt2", "vpt"),
    ("vpt", "vpt3", "shallow", None),
    ("pets", "lora", "houlsby", "probe", None),
    ("pets", "vpt", "lora", "bitfit", "lst", "ia3"),
    tuple(METHODS),
]


@pytest.mark.parametrize(
    "mix", [pytest.param(mix, marks=pytest.mark.exhaustive if len(mix) > 6 else ()) for mix in MIXES], ids=str
)
@torch.no_grad()
def test_one_batch_for_many_tasks(saved: dict[str, Path], mix: tuple[str | None, ...]) -> None:
    bank = petune.AdapterBank(model())
    for name in filter(None, mix):
        if name not in bank.adapters:
            bank.load(name, saved[name])
    names = list(itertools.islice(itertools.cycle(mix), max(6, len(mix))))
    x = torch.randn(len(names), 3, 16, 16)
    out = bank(x, names)
    for row, name in enumerate(names):
        expected = logits(model() if name is None else single_task(saved[name], name), x[row : row + 1])[0]
        assert out[row].shape == expected.shape
        torch.testing.assert_close(out[row], expected, atol=1e-6, rtol=1e-5)
    assert bank.active is None
    assert torch.equal(logits(bank.model), logits(model()))


@pytest.mark.parametrize(
    ("mix", "passes"),
    [(("pets", "cars", "lora", "lora2", "probe", "houlsby", None), 1), (("vpt", "vpt2", "pets"), 2),
     (("vpt", "vpt3", "shallow", "bitfit", "lst", "ia3"), 6)],
)  # fmt: skip
def test_tasks_share_a_forward_where_they_can(saved: dict[str, Path], mix: tuple[str | None, ...], passes: int) -> None:
    bank = petune.AdapterBank(model())
    for name in filter(None, mix):
        bank.load(name, saved[name])
    seen: list[int] = []
    bank.model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    bank(torch.randn(len(mix), 3, 16, 16), list(mix))
    assert len(seen) == passes
    assert sum(seen) == len(mix)


def test_refused_calls_of_a_bank(saved: dict[str, Path]) -> None:
    bank = petune.AdapterBank(model())
    bank.load("pets", saved["pets"])
    with pytest.raises(UsageError, match="already loaded"):
        bank.load("pets", saved["cars"])
    with pytest.raises(UsageError, match="no adapter 'dogs'"):
        bank.use("dogs")
    with pytest.raises(UsageError, match="one name per row"):
        bank(X, ["pets"])
    with pytest.raises(AttachError, match="detach"):
        petune.AdapterBank(bank.model)


def test_a_task_that_does_not_fit_leaves_the_others_alone(saved: dict[str, Path], tmp_path: Path) -> None:
    other = model()
    nn.init.normal_(other.blocks[0].attn.qkv.weight)
    petune.attach(other, "adaptformer").save(tmp_path / "foreign")
    bank = petune.AdapterBank(model())
    bank.load("pets", saved["pets"])
    with pytest.raises(petune.PetuneError, match="other weights"):
        bank.load("foreign", tmp_path / "foreign")
    assert torch.equal(logits(bank.use("pets")), logits(single_task(saved["pets"], "pets")))


WINDOWS = {"lora": {"r": 2}, "lora:": {"targets": "attn"}, "adaptformer": {}, "ssf": {}, "houlsby": {}}


def windowed(num_classes: int) -> nn.Module:
    """A Swin of two stages, 4 windows an image in the first; the trunk is the same whatever the classifier."""
    torch.manual_seed(0)
    shape = {"img_size": 28, "patch_size": 2, "window_size": 7, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 2)}
    built = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **shape)
    for p in built.parameters():
        nn.init.normal_(p, std=0.1)
    built.reset_classifier(num_classes)
    nn.init.normal_(built.get_classifier().weight)
    return built.eval()


@torch.no_grad()
@pytest.mark.exhaustive
def test_one_batch_on_a_model_with_windows(tmp_path: Path) -> None:
    """A layer inside the attention has a row for each window, so its task cannot share a forward."""
    bank = petune.AdapterBank(windowed(3))
    single = {}
    for number, (name, options) in enumerate(WINDOWS.items(), 2):
        att = petune.attach(windowed(number), name.strip(":"), **options)
        for p in att.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
        att.save(tmp_path / str(number))
        bank.load(name, tmp_path / str(number))
        single[name] = att.model
    names = [*WINDOWS, None, *WINDOWS]
    x = torch.randn(len(names), 3, 28, 28)
    for _ in range(2):
        for row, (name, out) in enumerate(zip(names, bank(x, names), strict=True)):
            expected = logits(single[name] if name else windowed(3), x[row : row + 1])[0]
            assert out.shape == expected.shape
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(bank.model, x), logits(windowed(3), x))


def filled(att: petune.Attachment, value: float) -> petune.Attachment:
    with torch.no_grad():
        for p in att.parameters():
            p.fill_(value)
    return att


@pytest.mark.parametrize("first_enabled", [True, False])
def test_what_two_train_is_restored_in_any_order(first_enabled: bool) -> None:
    built = model()
    plain = logits(built)
    a = filled(petune.attach(built, "linear", name="a"), 0.1)
    of_a = logits(built)
    b = filled(petune.attach(built, "linear", name="b"), 0.2)
    of_b = logits(built)
    a.disable()
    assert torch.equal(logits(built), of_b)  # the last one that is enabled counts
    b.disable()
    assert torch.equal(logits(built), plain)
    for att in (a, b) if first_enabled else (b, a):
        att.enable()
    assert torch.equal(logits(built), of_b)
    b.disable()
    assert torch.equal(logits(built), of_a)
    filled(a, 0.3)
    trained_later = logits(built)
    b.enable()
    b.detach()
    assert torch.equal(logits(built), trained_later)
    a.detach()
    assert torch.equal(logits(built), plain)


def test_one_that_is_disabled_while_another_attaches_keeps_its_values() -> None:
    built = model()
    plain = logits(built)
    a = filled(petune.attach(built, "linear", name="a"), 0.1)
    of_a = logits(built)
    a.disable()
    b = filled(petune.attach(built, "linear", name="b"), 0.2)
    b.disable()
    a.enable()
    assert torch.equal(logits(built), of_a)
    a.detach()
    assert torch.equal(logits(built), plain)
    b.enable()
    b.detach()
    assert torch.equal(logits(built), plain)


@pytest.mark.parametrize("method", ["adaptformer", "bitfit", "full"])
def test_one_that_is_disabled_is_saved_as_trained(method: str, tmp_path: Path) -> None:
    built = model()
    att = filled(petune.attach(built, method), 0.05)
    trained = logits(built)
    with att.disabled():
        att.save(tmp_path)
    fresh = model()
    petune.load(fresh, tmp_path)
    assert torch.equal(logits(fresh), trained)
    att.disable()
    if method == "bitfit":
        att.merge()
        assert torch.equal(logits(built), trained)
    else:
        att.detach()
    with pytest.raises(AttachError, match="detached or merged"):
        att.save(tmp_path / "late")
    assert not (tmp_path / "late").exists()


def test_a_task_that_is_not_in_use_is_saved_as_trained(saved: dict[str, Path], tmp_path: Path) -> None:
    built = model()
    bank = petune.AdapterBank(built)
    bank.load("bitfit", saved["bitfit"])
    bank.adapters["bitfit"].attachment.save(tmp_path)
    fresh = model(3)
    petune.load(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(single_task(saved["bitfit"], "bitfit")))


def test_an_attachment_is_not_copied() -> None:
    with pytest.raises(AttachError, match="Copy the model"):
        copy.deepcopy(petune.attach(model(), "adaptformer"))


def beit() -> nn.Module:
    torch.manual_seed(0)
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}
    built = timm.create_model("beit_base_patch16_224", **shape).eval()
    for p in built.parameters():
        nn.init.normal_(p, std=0.1)
    return built


@pytest.mark.parametrize("first", [True, False])
def test_a_layer_that_two_need_called_is_called_until_the_last_goes(first: bool) -> None:
    built = beit()
    plain = logits(built)
    atts = [petune.attach(built, "lora", name=name) for name in "ab"]
    gone, stays = atts if first else reversed(atts)
    filled(stays, 0.05)
    with gone.disabled():
        alive = logits(built)
        with stays.disabled():
            assert torch.equal(logits(built), plain)
    gone.detach()
    assert torch.equal(logits(built), alive)
    with torch.no_grad():
        for key, p in stays.tuned.items():
            p.add_(torch.randn_like(p)) if "qkv" in key else None
    assert not torch.equal(logits(built), alive)
    stays.detach()
    assert torch.equal(logits(built), plain)
    assert not any(block.attn.qkv_bias_separate for block in built.blocks)


@pytest.mark.parametrize("method", ["full", "partial"])
def test_what_trains_the_backbone_leaves_others_adapters_alone(method: str, tmp_path: Path) -> None:
    built = model()
    other = petune.attach(built, "adaptformer")
    att = petune.attach(built, method)
    assert att.counts.tuned == petune.attach(model(), method).counts.tuned
    assert att.tuned.keys().isdisjoint(other.tuned)
    other.detach()
    filled(att, 0.05).save(tmp_path)
    fresh = model()
    petune.load(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(built))


class Logarithms(nn.Module):
    """A model that changes the output of its classifier."""

    image_size = 16

    def __init__(self) -> None:
        super().__init__()
        self.inner = model()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).log_softmax(-1)


class TokensFirst(nn.Module):
    """A model whose blocks see (tokens, images, width): as many tokens as there are images in a batch of 17."""

    image_size = 16

    def __init__(self) -> None:
        super().__init__()
        inner = model()
        self.patch_embed, self.cls_token, self.head = inner.patch_embed, inner.cls_token, inner.head
        torch.manual_seed(0)
        layer = {"d_model": inner.embed_dim, "nhead": 2, "dim_feedforward": 32, "norm_first": True}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(**layer) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch_embed(x)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1).transpose(0, 1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(tokens[0])


@pytest.mark.parametrize("kind", [Logarithms, TokensFirst])
def test_a_mixed_batch_is_right_where_tasks_cannot_share_a_forward(kind: type[nn.Module], tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return kind().eval()

    bank, singles = petune.AdapterBank(make()), []
    for name in "ab":
        built = make()
        att = petune.attach(built, "houlsby")
        torch.manual_seed(ord(name))
        with torch.no_grad():
            for p in att.parameters():
                p.add_(torch.randn_like(p), alpha=0.3)
        att.save(tmp_path / name)
        singles.append(built)
        bank.load(name, tmp_path / name)
    tokens = 1 + next(m.num_patches for m in bank.model.modules() if hasattr(m, "num_patches"))
    x = torch.randn(tokens, 3, 16, 16)
    with torch.no_grad():
        mixed = bank(x, ["ab"[row % 2] for row in range(tokens)])
    for row, got in enumerate(mixed):
        torch.testing.assert_close(got, logits(singles[row % 2], x[row : row + 1])[0])


@pytest.mark.parametrize("method", ["lora", "adaptformer", "l2sp", "peft:adalora"])
def test_one_tuner_on_two_models_mixes_nothing(method: str, tmp_path: Path) -> None:
    tuner = build_tuner(method)
    first, second = petune.attach(tiny(), tuner, name="a"), petune.attach(tiny(seed=1), tuner, name="a")
    first.save(tmp_path / "a")
    again = petune.load(tiny(), tmp_path / "a")
    assert again.counts.tuned == first.counts.tuned
    first.model(X).sum().backward()
    loss = first.loss(0)
    if isinstance(loss, torch.Tensor) and loss.requires_grad:
        loss.backward()
    assert all(p.grad is None for p in second.parameters())
