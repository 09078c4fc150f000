#!/usr/bin/env bash
# torch 2.14.1, CPU: under no_grad, nn.Linear returns other numbers (by rounding, 2e-7) for the same input when its
# weight has requires_grad=False, if the input has three dimensions and is not contiguous, as the tokens that DETR and
# RT-DETR make of a map by flatten(2).transpose(1, 2). torch.matmul folds the batch or not by requires_grad of its second
# argument, although nothing is recorded. So freezing a model changes its outputs, and tests "to the bit" fail.
# Expected output: "not contiguous: False, contiguous: True"
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.14.1
cd "$dir"
"$dir/venv/bin/python" - <<'PY'
import torch

torch.manual_seed(0)
linear = torch.nn.Linear(32, 32)
tokens = torch.randn(2, 32, 4).transpose(1, 2)
equal = {}
for name, x in (("not contiguous", tokens), ("contiguous", tokens.contiguous())):
    with torch.no_grad():
        trainable = linear.requires_grad_(True)(x)
        frozen = linear.requires_grad_(False)(x)
    equal[name] = torch.equal(trainable, frozen)
print(", ".join(f"{name}: {same}" for name, same in equal.items()))
assert equal == {"not contiguous": False, "contiguous": True}
PY
