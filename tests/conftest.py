"""What all tests share."""

from pathlib import Path

import pytest

# PEFT's BOFT imports setuptools, which fails once anything (transformers, triton) has imported Python's own distutils.
import setuptools  # noqa: F401


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a second, of AdaptFormer on digits; to be read, not written."""
    from petune.runner.run import run

    place = tmp_path_factory.mktemp("digits") / "run"
    run(
        method="adaptformer:bottleneck=4",
        backbone="vit_nano",
        weights="none",
        backbone_options={"depth": 2, "embed_dim": 48},
        dataset="digits",
        shots=20,
        device="cpu",
        train={"epochs": 1, "precision": "fp32", "lr": 0.01},
        output=place,
    )
    return place
