"""A module is computed once for rows that have a weight and a bias each."""

from __future__ import annotations

import pytest
import timm.layers
import torch
from torch import Tensor, nn

from petune.serving.row_values import affine_names, can_stack, stacked_output


class FromOne(nn.RMSNorm):
    """Scales by one more than its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.normalized_shape) * (1 + self.weight)


MODULES = [
    (nn.Linear(6, 5), (4, 3, 6)),
    (nn.Linear(6, 5), (2, 6)),
    (nn.Linear(6, 5), (2, 2, 2, 6)),
    (nn.Conv2d(3, 5, 2, 2), (4, 3, 4, 4)),
    (nn.LayerNorm(6), (4, 3, 6)),
    (nn.LayerNorm(6, bias=False), (4, 3, 6)),
    (timm.layers.LayerNorm(6), (2, 3, 6)),
    (nn.RMSNorm(6), (2, 3, 6)),
]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_has_its_own_values(dtype: torch.dtype) -> None:
    """Inputs have one or two entries (windows) for each of two rows."""
    torch.manual_seed(0)
    for module, shape in MODULES:
        built = module.to(dtype)
        names = affine_names(built)
        assert can_stack(built, names), module
        x = torch.randn(shape).to(dtype)
        before = dict(built.named_parameters())
        values = {name: [torch.randn_like(before[name]) for _ in range(2)] for name in names}
        output = stacked_output(built, built.forward, x, values)
        assert all(before[name] is p for name, p in built.named_parameters())
        each = len(x) // 2
        for row in range(2):
            own = {name: tensors[row] for name, tensors in values.items()}
            expected = torch.func.functional_call(built, own, x[row * each : (row + 1) * each])
            got = output[row * each : (row + 1) * each]
            rounding = 1e-6 if dtype == torch.float32 else 2e-2
            assert got.dtype == dtype
            torch.testing.assert_close(got, expected, atol=rounding, rtol=rounding)
        module.float()


def test_modules_that_use_their_tensors_in_another_way() -> None:
    assert not can_stack(nn.Linear(6, 5), ["weight"])
    assert not can_stack(nn.Linear(6, 5), ["weight", "bias"])
    assert not can_stack(nn.LayerNorm((2, 6)), ["weight", "bias"])
    assert not can_stack(nn.BatchNorm1d(6), ["weight", "bias"])
    assert not can_stack(FromOne(6), ["weight"])
    assert not can_stack(timm.layers.LayerNorm2d(6), ["weight", "bias"])
