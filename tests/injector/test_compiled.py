"""A model that was compiled and used before something is attached to it computes with the adapters."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import petune
from tests.sampling import sampled
from tests.tiny import X, randomised, tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's and the compiler's
METHODS = sorted({record.name for record in petune.list_tuners()} - {"peft"} | {"peft:ia3", "peft:oft"})
SAMPLE = {"adaptformer"}
CASES = sampled(METHODS, SAMPLE.__contains__)


def frozen() -> nn.Module:
    """A model that attaching cannot freeze further, so that no parameter tells the compiled code of a change."""
    return tiny().requires_grad_(False)


def compiled_model(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, backend="eager")


def compiled_function(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.compile(lambda x: model(x), backend="eager")


@pytest.mark.parametrize(
    "compiled", sampled([compiled_model, compiled_function], lambda build: build is compiled_function)
)
@pytest.mark.parametrize("method", CASES)
@torch.no_grad()
def test_code_compiled_before_attaching_runs_the_adapter(
    method: str, compiled: Callable[[nn.Module], Callable[[Tensor], Tensor]]
) -> None:
    model = frozen()
    call = compiled(model)
    plain = call(X)
    att = randomised(petune.attach(model, method))
    if att.tuned:
        assert not torch.allclose(model(X), plain, atol=1e-3)
    torch.testing.assert_close(call(X), model(X))
    att.disable()
    torch.testing.assert_close(call(X), plain)
    att.enable()
    torch.testing.assert_close(call(X), model(X))
    second = randomised(petune.attach(model, "houlsby", name="second"))
    torch.testing.assert_close(call(X), model(X))
    second.detach()
    torch.testing.assert_close(call(X), model(X))
    att.detach()
    torch.testing.assert_close(call(X), plain)


@pytest.mark.exhaustive
def test_attaching_does_not_import_the_compiler() -> None:
    code = """
import sys, torch, petune
from tests.tiny import tiny
model = tiny()
before = "torch._dynamo" in sys.modules
petune.attach(model, "adaptformer").detach()
assert before or "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
