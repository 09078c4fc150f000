"""PEFT's types in a model that is converted to another number format, and converted to LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import petune
from petune.tuners.peft_bridge.options import peft_types
from tests.peft_models import X, logits, model, randomized
from tests.sampling import sampled

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT and its dependencies warn of much

TYPES = sorted(peft_types())
HALVES = {"adamss", "fourierft", "psoft"}


@pytest.mark.parametrize("kind", sampled(TYPES, HALVES.__contains__))
@torch.no_grad()
def test_a_model_that_is_converted_after_attaching_computes_the_same(kind: str) -> None:
    torch.manual_seed(0)
    att = randomized(petune.attach(model(), f"peft:{kind}"))
    expected = att.model.eval()(X)
    limits = {torch.float64: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.2}
    for dtype, limit in limits.items():
        half = att.model.to(dtype)(X.to(dtype))
        assert half.dtype == dtype
        assert float((half.float() - expected).abs().max()) < limit * float(expected.abs().max())


@pytest.mark.parametrize("kind", sampled(TYPES, {"adamss", "fourierft"}.__contains__))
def test_every_type_is_converted_or_refused(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    att = randomized(petune.attach(model(), f"peft:{kind}"))
    expected = logits(att.model)
    att.save(tmp_path / "a")
    try:
        petune.convert(tmp_path / "a", tmp_path / "lora", model=model())
    except petune.NotMergeable:
        assert kind in {"ln_tuning", "prefix"}
        assert not (tmp_path / "lora").exists()
        return
    converted = petune.load(model(), tmp_path / "lora").model
    torch.testing.assert_close(logits(converted), expected, atol=1e-4, rtol=1e-3)
