"""Models that take anything: found, attached, trained, saved, loaded without the example, and given back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.video.swin_transformer import SwinTransformer3d

import petune
from petune.sites.input_spec import Inputs, InputSpec
from petune.sites.logits import logits_of
from tests.sites.any_input import EXAMPLES, Clips, Masked, Packed, Patches, TwoTowers, Volumes
from tests.tiny import tiny


def outputs(model: nn.Module, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return logits_of(inputs.call(model.eval()))


def train(att: petune.Attachment, inputs: Inputs) -> None:
    optimizer = torch.optim.SGD(att.parameters(), lr=0.1)
    att.train()
    for _ in range(2):
        optimizer.zero_grad()
        logits_of(inputs.call(att.model)).square().sum().backward()
        optimizer.step()
    att.check_gradients()


def test_models_of_any_input_are_tuned_saved_and_loaded_without_the_example(tmp_path: Path) -> None:
    for kind, example in EXAMPLES.items():
        torch.manual_seed(0)
        model = kind()
        fresh = copy.deepcopy(model)
        att = petune.attach(model, "adaptformer", example=example(), bottleneck=2)
        sites = att.sites
        assert len(sites.blocks) == 2, kind
        assert {"head", "norm"} <= sites.parts.keys(), kind
        inputs = sites.input_spec.noise(3)
        before = outputs(fresh, inputs)
        assert before.shape == (3, 3), kind
        train(att, inputs)
        att.save(tmp_path / kind.__name__)
        loaded = petune.load(copy.deepcopy(fresh), tmp_path / kind.__name__)
        assert loaded.sites.input_spec == sites.input_spec, kind
        assert torch.equal(outputs(loaded.model, inputs), outputs(model, inputs)), kind
        assert not torch.equal(outputs(model, inputs), before), kind
        att.detach()
        assert torch.equal(outputs(model, inputs), before), kind
        assert model.state_dict().keys() == fresh.state_dict().keys(), kind


def test_what_a_forward_takes_is_described_as_it_is() -> None:
    spec = petune.find_sites(Volumes(), example=torch.zeros(2, 2, 4, 8, 12)).input_spec
    assert spec.to_json() == [2, 4, 8, 12]
    assert petune.find_sites(Volumes(), (2, 4, 8, 12)).input_spec == spec
    sites = petune.find_sites(Volumes(), (2, 4, 8, 12))
    assert (sites.num_prefix_tokens, sites.grid_size, sites.image_grid) == (1, (2, 2, 3), None)
    first, second = petune.find_sites(Masked(), example=EXAMPLES[Masked]()).input_spec.tensors
    assert (first.batch_dim, first.shape) == (1, (5, 1, 6))
    assert second.batch_dim is None
    rows, counts = petune.find_sites(Packed(), example=EXAMPLES[Packed]()).input_spec.tensors
    assert (rows.shape, counts.values) == ((7, 6), ((7, 1),))


def test_integers_and_masks_are_kept_and_content_is_not() -> None:
    spec = petune.find_sites(Patches(), example=EXAMPLES[Patches]()).input_spec
    batch = spec.noise(2).args[0]
    assert torch.equal(batch["patch_coord"], EXAMPLES[Patches]()["patch_coord"])
    assert bool(batch["patch_valid"].all())  # the first sample's
    assert batch["patches"].std() > 0.5
    spec = petune.find_sites(TwoTowers(), example=EXAMPLES[TwoTowers]()).input_spec
    assert spec.noise(2).kwargs["text"]["mask"].tolist() == [[1.0, 1.0, 0.0]] * 2
    again = InputSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec
    assert torch.equal(again.synthetic(2).kwargs["pixels"], spec.synthetic(2).kwargs["pixels"])


def test_masks_of_floating_point_are_kept() -> None:
    image, mask = torch.zeros(1, 2, 4, 8, 12), torch.ones(1, 7)
    bias = torch.zeros(3, 3).masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf)

    class Anything(Volumes):
        def forward(self, x: Tensor, *others: Tensor) -> Tensor:
            return super().forward(x)

    spec = petune.find_sites(Anything(), example=(image, mask, bias)).input_spec
    again = InputSpec.from_json(json.loads(json.dumps(spec.to_json(), allow_nan=False)))
    noise, kept, kept_bias = again.noise(2).args
    assert noise.std() > 0.5
    assert torch.equal(kept, torch.ones(2, 7))
    assert torch.equal(kept_bias, bias)


def test_positions_before_the_pixels_of_patches_are_kept() -> None:
    """Pix2Struct takes rows that begin with the row and column of a patch, and looks these up."""

    class Positioned(nn.Module):
        def forward(self, patches: Tensor) -> Tensor:
            return patches[..., 2:].mean((1, 2)) + torch.eye(5)[patches[..., :2].long()].sum((1, 2, 3))

    positions = torch.cartesian_prod(torch.arange(1.0, 5), torch.arange(1.0, 5)).expand(2, 16, 2)
    spec = petune.find_sites(Positioned(), example=torch.cat([positions, torch.rand(2, 16, 12)], -1)).input_spec
    again = InputSpec.from_json(json.loads(json.dumps(spec.to_json())))
    first, other = (again.noise(3, seed).tensors[0] for seed in (0, 1))
    assert torch.equal(first[..., :2], positions[:1].expand(3, 16, 2))
    assert torch.equal(first[..., :2], other[..., :2])
    assert (first[..., 2:] != other[..., 2:]).all()
    for content in (torch.ones(2, 16, 12), torch.arange(384.0).reshape(2, 16, 12)):  # whole numbers all over
        assert not petune.find_sites(Positioned(), example=content % 5).input_spec.tensors[0].values


def test_a_bank_takes_what_its_model_takes(tmp_path: Path) -> None:
    for kind in (TwoTowers, Packed):
        torch.manual_seed(0)
        model = kind()
        example = EXAMPLES[kind]()
        for seed, name in enumerate(("a", "b")):
            torch.manual_seed(seed)
            att = petune.attach(copy.deepcopy(model), "adaptformer", example=example, bottleneck=2)
            with torch.no_grad():
                for p in att.parameters():
                    p.add_(torch.randn_like(p))
            att.save(tmp_path / kind.__name__ / name)
        inputs = att.sites.input_spec.noise(3)
        bank = petune.AdapterBank(copy.deepcopy(model), example=example)
        for name in ("a", "b"):
            bank.load(name, tmp_path / kind.__name__ / name)
        x = inputs.kwargs if not inputs.args else (inputs.args, inputs.kwargs)
        mixed = bank(x, ["a", None, "b"])
        assert torch.allclose(mixed[1], outputs(model, inputs)[1], atol=1e-5)
        assert torch.allclose(mixed[2], outputs(att.model, inputs)[2], atol=1e-5)


def test_windows_of_a_video_are_found() -> None:
    settings = {"patch_size": [2, 4, 4], "embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": [2, 4, 4]}
    swin = SwinTransformer3d(**settings, num_classes=3)  # type: ignore[arg-type]
    att = petune.attach(swin, "adaptformer", example=torch.zeros(1, 3, 4, 16, 16))
    assert [block.layout for block in att.sites.blocks] == ["BHWC", "BHWC"]
    assert att.sites.grid_size == (2, 4, 4)
    train(att, att.sites.input_spec.noise(2))


def test_samples_are_selected_along_their_own_dimension() -> None:
    for kind, example in EXAMPLES.items():
        torch.manual_seed(0)
        model = kind()
        spec = petune.find_sites(model, example=example()).input_spec
        inputs = spec.noise(3)
        chosen = outputs(model, spec.select(inputs, [2, 0]))
        assert torch.allclose(chosen, outputs(model, inputs)[[2, 0]], atol=1e-5), kind


def test_integers_with_other_values_belong_to_the_same_adapter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TwoTowers()
    fresh = copy.deepcopy(model)
    petune.attach(model, "linear", example=EXAMPLES[TwoTowers]()).save(tmp_path / "a")
    other = EXAMPLES[TwoTowers]()
    other["text"]["ids"] = torch.tensor([[3, 4, 5]])
    loaded = petune.load(fresh, tmp_path / "a", sites=petune.find_sites(fresh, example=other))
    assert loaded.sites.input_spec.tensors[1].values[0] == (3, 1)


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (
            Clips(),
            torch.zeros(1, 3, 5, 8, 8),
            r"Clips fails on the example \(1x3x5x8x8\): RuntimeError: .*",
        ),
        (Patches(), {"patches": torch.zeros(1, 6, 12)}, r"on the example \(1x6x12\): KeyError: 'patch_coord'"),
        (TwoTowers(), {"pixels": torch.zeros(1, 1, 8, 12)}, "missing 1 required keyword-only argument: 'text'"),
        (Clips(), "clip.mp4", "example holds no tensor"),
        (Clips(), {"clips": object()}, "example holds object"),
        (Clips(), (), "example holds no tensor"),
        (Volumes(), None, r"does not tell its image size.*example="),
    ],
)
def test_an_example_that_the_forward_refuses_is_one_clear_error(model: nn.Module, example: Any, message: str) -> None:
    with pytest.raises(petune.AttachError, match=message):
        petune.attach(model, "linear", example=example)


def test_an_example_and_a_size_or_sites_are_not_given_together() -> None:
    model = tiny()
    with pytest.raises(petune.UsageError, match="not both"):
        petune.find_sites(model, (3, 16, 16), example=torch.zeros(1, 3, 16, 16))
    with pytest.raises(petune.UsageError, match="not both"):
        petune.attach(model, "linear", sites=petune.find_sites(model), example=torch.zeros(1, 3, 16, 16))


def test_an_image_as_example_is_the_same_as_its_size() -> None:
    model = tiny()
    sites = petune.find_sites(model, example=torch.zeros(2, 3, 16, 16))
    assert str(sites) == str(petune.find_sites(model))


def test_looking_at_an_example_leaves_model_and_example_as_they_were() -> None:
    model, example = Patches(), EXAMPLES[Patches]()
    before = {key: value.clone() for key, value in example.items()}
    attributes = {path: dict(vars(module)) for path, module in model.named_modules()}
    state = torch.get_rng_state()
    petune.find_sites(model, example=example)
    assert torch.equal(torch.get_rng_state(), state)
    assert {path: dict(vars(module)) for path, module in model.named_modules()} == attributes
    assert all(torch.equal(example[key], value) for key, value in before.items())


class Cut(Packed):
    """Take the tokens of all samples in one row, and where each starts and ends: attention sees its own sample."""

    def forward(self, patches: Tensor, cu_seqlens: Tensor) -> Tensor:
        return super().forward(patches, cu_seqlens.diff())


class ByLength(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Cut()

    def forward(self, patches: Tensor, lengths: Tensor) -> Tensor:
        return self.inner(patches, torch.nn.functional.pad(lengths.cumsum(0), (1, 0)))


@pytest.mark.parametrize("ends", [[0, 7], [0, 3, 7]])
def test_packed_samples_are_refused_with_the_form_that_works(ends: list[int]) -> None:
    example = {"patches": torch.zeros(7, 6), "cu_seqlens": torch.tensor(ends)}
    with pytest.raises(petune.AttachError, match=r"one row of 7 tokens.* takes the length of each sample"):
        petune.attach(Cut(), "lora", example=example)
    lengths = {"patches": torch.zeros(7, 6), "lengths": torch.tensor([7])}
    att = petune.attach(ByLength(), "adaptformer", example=lengths)
    assert (len(att.sites.blocks), att.sites.head.path) == (2, "inner.head")
