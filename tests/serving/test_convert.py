"""`petune.convert`: PEFT alone computes what the adapter computed; what LoRA cannot represent is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

import petune
from tests.sampling import sampled
from tests.tiny import tiny
from tests.trained import changed, saved_run

X = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))
SHAPE = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 1, "num_heads": 3}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def plain_model(att: petune.Attachment) -> torch.nn.Module:
    """timm's own model with the backbone's weights, and a new classifier."""
    model = timm.create_model("vit_tiny_patch16_224", **SHAPE, num_classes=3)
    with att.disabled():
        state = {key.replace(".base_layer", ""): t for key, t in att.model.state_dict().items()}
        own = {key: t.clone() for key, t in state.items() if key in model.state_dict()}
    model.load_state_dict(own)
    return model


@pytest.mark.parametrize(
    ("method", "options", "rank"),
    sampled(
        [
            ("lora", {"r": 3, "lora_alpha": 5}, 3),
            ("fact", {"rank": 2}, 2),
            ("repadapter", {"bottleneck": 4}, 4),
            ("dora", {"r": 2}, 48),  # a norm over each row gives the change full rank
            ("peft:ia3", {}, 48),
        ],
        lambda row: row[0] in {"fact", "repadapter"},
    ),
)
def test_peft_computes_the_same(method: str, options: dict[str, object], rank: int, tmp_path: Path) -> None:
    from peft import PeftModel

    path, att = saved_run(tmp_path / "a", method, **options)
    expected = att.model.eval()(X)
    done = petune.convert(path, tmp_path / "out")
    assert done.rank == rank
    assert done.largest_error < 1e-6
    assert done.max_abs_diff < 1e-4 * done.largest_logit
    tuned = PeftModel.from_pretrained(plain_model(att), str(tmp_path / "out")).eval()
    torch.testing.assert_close(tuned(X), expected, atol=1e-6, rtol=1e-4)
    predictor = petune.Predictor(tmp_path / "out", device="cpu")
    torch.testing.assert_close(predictor.outputs(X), expected.detach(), atol=1e-6, rtol=1e-4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Converted from" in card


def test_a_lower_rank_says_what_it_leaves_out(tmp_path: Path) -> None:
    path, att = saved_run(tmp_path / "a", "lora", r=4)
    done = petune.convert(path, tmp_path / "out", rank=2)
    assert done.rank == 2
    saved = {key: t.detach() for key, t in att.file_state().items()}
    for layer, error in done.errors.items():
        change = saved[f"base_model.model.{layer}.lora_B.weight"] @ saved[f"base_model.model.{layer}.lora_A.weight"]
        singular = torch.linalg.svdvals(2 * change.double())  # α/r
        assert error == pytest.approx(float(singular[2:].norm() / singular.norm()), rel=1e-4)
    assert done.max_abs_diff > 1e-3


@pytest.mark.parametrize(
    ("method", "message"),
    sampled(
        [("adaptformer", "ReLU"), ("vpt", "prompt"), ("houlsby", "GELU"), ("norm", "norm1.*nn.Linear"),
         ("bitfit", "nn.Linear"), ("full", "nn.Linear"), ("linear", "nothing to convert")],
        lambda row: row[0] in {"adaptformer", "norm"},
    ),
)  # fmt: skip
def test_what_is_not_linear_is_refused(method: str, message: str, tmp_path: Path) -> None:
    path, _ = saved_run(tmp_path / "a", method)
    with pytest.raises(petune.NotMergeable, match=message):
        petune.convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_input_writes_nothing(tmp_path: Path) -> None:
    path, att = saved_run(tmp_path / "a", "lora", r=2)
    with pytest.raises(petune.UsageError, match="exists"):
        petune.convert(path, path)
    with pytest.raises(petune.UsageError, match="rank is 0"):
        petune.convert(path, tmp_path / "out", rank=0)
    with pytest.raises(petune.UnknownName, match="peft-lora"):
        petune.convert(path, tmp_path / "out", to="peft-lroa")
    assert not (tmp_path / "out").exists()
    bare = tmp_path / "bare"
    att.save(bare)
    with pytest.raises(petune.CheckpointError, match="does not record its backbone"):
        petune.convert(bare, tmp_path / "out")
    model = plain_model(att).eval()
    before = model(X)
    petune.convert(bare, tmp_path / "out", model=model)
    assert torch.equal(model(X), before)  # left as it was


def test_a_conversion_is_a_start(tmp_path: Path) -> None:
    """`petune run --from` takes the method from what is recorded."""
    from petune.runner.continued import check_same_model
    from petune.runner.run_adapter import read_run_adapter
    from petune.runner.run_config import RunConfig

    path, _ = saved_run(tmp_path / "a", "repadapter")
    path = changed(path, tmp_path / "b", method="repadapter")
    petune.convert(path, tmp_path / "out", rank=2)
    saved = read_run_adapter(tmp_path / "out")
    recorded = saved.config["metadata"]["backbone"]
    config = RunConfig(
        method=saved.config["metadata"]["method"], backbone="vit_nano", weights="none",
        image_size=recorded["image_size"], backbone_options=recorded["options"],
    )  # fmt: skip
    check_same_model(config, saved)


def test_a_diverged_adapter_is_named(tmp_path: Path) -> None:
    model = tiny()
    att = petune.attach(model, "lora:r=2")
    with torch.no_grad():
        next(iter(att.tuned.values())).fill_(float("nan"))
    att.save(tmp_path / "a")
    for rank in (None, 1):
        with pytest.raises(petune.CheckpointError, match="NaN or infinite"):
            petune.convert(tmp_path / "a", tmp_path / "out", model=tiny(), rank=rank)
    assert not (tmp_path / "out").exists()
