#!/usr/bin/env bash
# torch 2.14.1: a BatchNorm in training mode writes its running statistics without moving their version counter.
# One would expect the counter (`tensor._version`) to move, as it does for `num_batches_tracked` of the same layer and for
# every documented in-place operation: autograd relies on it to refuse a backward whose saved tensors were changed.
# What happens: running_mean and running_var change, both counters stay. So a forward in eval mode, then one in training
# mode, then the backward of the first one runs without the usual error, and its gradient is the one of the new variance.
# (After `running_var.mul_(2)` in between, the same backward is refused.)
# Expected output: "changed: True version: 1 -> 1", "gradient off by: 0.70 of its size" and "after mul_: RuntimeError"
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.14.1
cd "$dir"
"$dir/venv/bin/python" - <<'PY'
import torch
from torch import nn

assert torch.__version__.startswith("2.14.1")
torch.manual_seed(0)
x = torch.randn(8, 3, requires_grad=True)


def gradient(between):
    """Return the gradient of an eval-mode forward, if something happens to the layer before the backward."""
    layer = nn.BatchNorm1d(3).eval()
    loss = layer(x).square().sum()
    between(layer)
    return torch.autograd.grad(loss, x)[0]


def train_once(layer):
    mean, version = layer.running_mean.clone(), layer.running_mean._version
    layer.train()(10 * torch.randn(8, 3))
    print(f"changed: {not torch.equal(layer.running_mean, mean)} version: {version} -> {layer.running_mean._version}")


right = gradient(lambda layer: None)
wrong = gradient(train_once)
print(f"gradient off by: {(wrong - right).norm() / right.norm():.2f} of its size")
assert (wrong - right).norm() > 0.1 * right.norm()
try:
    gradient(lambda layer: layer.running_var.mul_(2))
except RuntimeError:
    print("after mul_: RuntimeError")
else:
    raise SystemExit("a changed running variance is no longer noticed")
PY
