#!/usr/bin/env bash
# torch 2.14.1, CPU: under no_grad, nn.Linear runs another product for the same input when its weight has
# requires_grad=False, if the input has three dimensions and is not contiguous, as the tokens that DETR and RT-DETR make of
# a map by flatten(2).transpose(1, 2): `mm` on the copied input if the weight is trainable, `bmm` on a stack of views of the
# weight if it is frozen, although nothing is recorded in either case. So freezing a model changes its outputs by rounding
# (2e-7 on an Intel Xeon), and tests "to the bit" fail. A contiguous input takes `addmm` both times.
# Expected output: "not contiguous: trainable mm, frozen bmm" and "contiguous: trainable addmm, frozen addmm"
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.14.1
cd "$dir"
"$dir/venv/bin/python" - <<'PY'
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Products(TorchDispatchMode):
    """Records the matrix products that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in {"mm", "bmm", "addmm"}:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


linear = torch.nn.Linear(32, 32)
tokens = torch.randn(2, 32, 4).transpose(1, 2)
seen = {}
for name, x in (("not contiguous", tokens), ("contiguous", tokens.contiguous())):
    for kind in ("trainable", "frozen"):
        linear.requires_grad_(kind == "trainable")
        with torch.no_grad(), Products() as products:
            linear(x)
        seen[name, kind] = "+".join(products.names)
    print(f"{name}: trainable {seen[name, 'trainable']}, frozen {seen[name, 'frozen']}")
assert list(seen.values()) == ["mm", "bmm", "addmm", "addmm"]
PY
