#!/usr/bin/env bash
# torchmetrics 1.9.0: R2Score returns 1.0, a perfect fit, for every prediction whose squared errors add up to less than about
# 1e-4, without a warning. It compares that sum with zero by an absolute tolerance before it divides by the variance of
# the targets. One would expect R² not to depend on the unit, as scikit-learn's r2_score does not: here widths of 50
# seeds from 1 to 2 mm, predicted in reversed order, score -3.0 in millimeters and 1.0 in meters. Small test sets and small
# units (meters, fractions, reflectances) are hit first; ten times as many seeds score 0.0, a hundred times as many -3.0.
# Expected output: "in mm -3.0, in m 1.0, by scikit-learn in m -3.0, in m of 500 seeds 0.0, of 5000 seeds -3.0"
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.14.1 torchmetrics==1.9.0 scikit-learn==1.9.1
cd "$dir"
"$dir/venv/bin/python" -W error - <<'PY'
import torch
from sklearn.metrics import r2_score
from torchmetrics.regression import R2Score


def r2(predicted: torch.Tensor, measured: torch.Tensor) -> float:
    metric = R2Score()
    metric.update(predicted, measured)
    return metric.compute().item()


in_mm = torch.linspace(1, 2, 50)
few, some, many = (torch.linspace(0.001, 0.002, count) for count in (50, 500, 5000))
values = [r2(widths.flip(0), widths) for widths in (in_mm, few, some, many)]
values.insert(2, r2_score(few, few.flip(0)))
print("in mm {:.1f}, in m {:.1f}, by scikit-learn in m {:.1f}, in m of 500 seeds {:.1f}, of 5000 seeds {:.1f}".format(*values))
assert [round(value, 1) for value in values] == [-3.0, 1.0, -3.0, 0.0, -3.0]
PY
