"""Costs against formulas: FLOPs of layers, memory that was really allocated, provenance that can be checked."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from petune.runner.provenance import device_name, forward_flops, git_state, installed_version, provenance
from petune.sites.input_spec import InputSpec

CPU = torch.device("cpu")


def test_flops_of_linear_and_convolution_are_the_formula() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 2, stride=2), nn.Flatten(), nn.Linear(8 * 4 * 4, 10))
    assert forward_flops(model, InputSpec.of_size((3, 8, 8))) == 2 * (8 * 4 * 4) * (3 * 2 * 2) + 2 * (8 * 4 * 4) * 10


def test_flops_of_attention_are_counted() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = x * self.scale
            return nn.functional.scaled_dot_product_attention(q, q, q)

    heads, tokens, width = 2, 5, 4
    assert (
        forward_flops(Attention(), InputSpec.of_size((heads, tokens, width))) == 2 * 2 * heads * tokens * tokens * width
    )


def test_counting_flops_restores_training_modes() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout())
    model[0].eval()
    model.training = True
    forward_flops(model, InputSpec.of_size((4,)))
    assert [m.training for m in model.modules()] == [True, False, True]


def test_flops_of_a_module_that_is_called_with_a_trained_parameter() -> None:
    class ClassToken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.fc = nn.Parameter(torch.ones(1, 4)), nn.Linear(4, 2)
            self.fc.bias.requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.token.expand(len(x), -1))

    model = ClassToken()
    assert forward_flops(model, InputSpec.of_size((4,))) == 2 * 4 * 2
    assert [p.requires_grad for p in model.parameters()] == [True, True, False]


PEAK = """
import gc
import numpy as np, torch
from petune.runner.provenance import PeakMemory
size = 96 * 2**20
before = np.ones(size, dtype=np.uint8)
before.sum()
del before
gc.collect()
memory = PeakMemory(torch.device("cpu"))
base = memory.bytes()
taken = np.ones(size, dtype=np.uint8)
del taken
print(memory.bytes() - base, size)
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(platform.system() != "Linux", reason="resident peak is only resettable on Linux")
def test_peak_memory_counts_only_later_allocations() -> None:
    # in a process of its own: memory freed by other tests' threads would hide the allocation
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    taken, size = map(int, done.stdout.split())
    assert size * 0.9 < taken < size * 1.3


def test_provenance_names_versions_device_and_threads() -> None:
    record = provenance(CPU)
    assert (
        record["versions"]["torch"] == torch.__version__.split("+")[0]
        or record["versions"]["torch"] == torch.__version__
    )
    assert record["threads"] == torch.get_num_threads()
    assert record["device"] == device_name(CPU)
    assert record["device"].endswith("cores")
    assert record["git"] is None or len(record["git"]["commit"]) == 40


def test_another_repository_is_not_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("petune.runner.provenance.__file__", str(tmp_path / "petune" / "measure.py"))
    (tmp_path / "petune").mkdir()
    assert git_state.__wrapped__() is None


def test_the_commit_is_the_one_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    at_start = provenance(CPU)["git"]
    monkeypatch.setattr("petune.runner.provenance.subprocess", None)  # whatever is committed meanwhile
    assert provenance(CPU)["git"] == at_start


def test_a_missing_package_has_no_version() -> None:
    assert installed_version("no-such-package-at-all") is None
