"""Drop path and dropout of the backbone in runs: an option for every method alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import petune
from petune.base.errors import ConfigError
from petune.runner.run_config import RunConfig
from petune.training.events import Note
from tests.sampling import sampled

SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 2}
TINY: dict[str, Any] = {
    "backbone": "vit_nano", "weights": "none", "dataset": "digits", "shots": 5, "device": "cpu",
    "train": {"epochs": 1, "batch_size": 10, "precision": "fp32"},
}  # fmt: skip


def _run(output: Path, method: str, options: dict[str, Any] | None = None, **config: Any) -> tuple[Any, list[str]]:
    notes: list[str] = []
    result = petune.run(
        **TINY | config,
        method=method,
        backbone_options=SMALL | (options or {}),
        output=output,
        watch=lambda event: notes.append(event.text) if isinstance(event, Note) else None,
    )
    return result, notes


def _losses(output: Path) -> str:
    return (output / "metrics.jsonl").read_text()


@pytest.mark.parametrize("method", sampled(["linear", "adaptformer:dropout=0", "full"], "adaptformer:dropout=0".__eq__))
def test_drop_path_is_an_option_for_every_method(method: str, tmp_path: Path) -> None:
    _run(tmp_path / "without", method)
    _, notes = _run(tmp_path / "with", method, drop_path=0.5)
    assert _losses(tmp_path / "with") != _losses(tmp_path / "without")
    assert any("drop path act in 2 modules" in note for note in notes)
    _run(tmp_path / "option", method, {"drop_path_rate": 0.5})
    assert _losses(tmp_path / "option") == _losses(tmp_path / "with")


@pytest.mark.parametrize("method", sampled(["linear", "full"], "full".__eq__))
def test_a_default_of_the_model_regularizes_no_method(method: str, tmp_path: Path) -> None:
    """timm's Swin comes with a drop path of 0.1, which would regularize full fine-tuning alone."""
    small = {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (1, 2), "num_heads": (2, 2), "patch_size": 4}
    swin = {"backbone": "swin_tiny_patch4_window7_224", "weights": "none"}
    config = TINY | swin | {"backbone_options": small, "method": method}
    notes: list[str] = []
    for name, rate in (("default", {}), ("zero", {"drop_path_rate": 0.0})):
        petune.run(
            **config | {"backbone_options": small | rate},
            output=tmp_path / name,
            watch=lambda event: notes.append(event.text) if isinstance(event, Note) else None,
        )
    assert _losses(tmp_path / "default") == _losses(tmp_path / "zero")
    assert any("comes with dropout or drop path" in note for note in notes)


def test_an_adapter_trained_with_drop_path_evaluates_without(tmp_path: Path) -> None:
    done, _ = _run(tmp_path / "run", "adaptformer", drop_path=0.5)
    assert petune.evaluate(tmp_path / "run").top1 == pytest.approx(done.top1)


def test_a_rate_that_does_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"drop_path_rate=.* has no effect"):
        _run(tmp_path / "run", "linear", {"depth": 1}, drop_path=0.1)


def test_a_method_that_needs_all_tokens_names_the_rate_that_drops_some(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"convpass does not work with patch_drop_rate=0\.3"):
        _run(tmp_path / "run", "convpass", {"patch_drop_rate": 0.3})


@pytest.mark.parametrize("method", sampled(["linear", "full"], "full".__eq__))
def test_a_rate_of_transformers_is_honored(method: str, tmp_path: Path) -> None:
    import transformers

    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.ViTConfig(**shape, image_size=16, patch_size=4)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    run = TINY | {"backbone": f"hf:{tmp_path / 'vit'}", "method": method}
    for rate in (0.0, 0.5):
        petune.run(**run, backbone_options={"hidden_dropout_prob": rate}, output=tmp_path / str(rate))
    assert _losses(tmp_path / "0.5") != _losses(tmp_path / "0.0")
    with pytest.raises(ConfigError, match="drop_path_rate"):  # transformers' ViT has none
        petune.run(**run, drop_path=0.1, output=tmp_path / "none")


def test_one_option_is_not_given_twice() -> None:
    with pytest.raises(ConfigError, match=r"drop_path and backbone_options\.drop_path_rate"):
        RunConfig.build({"drop_path": 0.1, "backbone_options": {"drop_path_rate": 0.2}}, "a test")


def test_the_option_has_the_name_that_the_library_uses() -> None:
    assert RunConfig(backbone="torchvision:swin_t", drop_path=0.1).drop_rates == {"stochastic_depth_prob": 0.1}
    assert RunConfig(backbone_options={"hidden_dropout_prob": 0.1, "depth": 2}).drop_rates == {
        "hidden_dropout_prob": 0.1
    }
    with pytest.raises(ConfigError, match="backbone_options"):
        RunConfig.build({"backbone": "my.module:factory", "drop_path": 0.1}, "a test")


def test_features_that_drop_path_changes_are_not_cached(tmp_path: Path) -> None:
    train = TINY["train"] | {"cache_features": "always", "epochs": 2, "augment": "none"}
    with pytest.raises(ConfigError, match="drop path of the backbone changes the features"):
        _run(tmp_path / "run", "linear", drop_path=0.5, train=train)
    _run(tmp_path / "cached", "linear", train=train)
