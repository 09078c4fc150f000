#!/usr/bin/env bash
# peft 0.21.2 with torch 2.14.1: merge_and_unload() on a linear layer whose weight is computed before each forward, by
# torch.nn.utils.weight_norm (the head of DINO) or torch.nn.utils.prune, returns a model without what LoRA learned.
# PEFT adds the product of its matrices to `weight.data`, which the layer's hook computes again from weight_g and weight_v, or
# from weight_orig and the mask, when the model is called next. One would expect an error, as PEFT raises where a layer
# cannot be merged, or a merge into the tensors that are kept. Nothing is said, with safe_merge=True neither, the LoRA
# matrices are gone from the returned model, and its outputs are those of the pretrained one.
# Expected output: "plain: merged as trained" and "weight_norm: trained change lost" and "pruned: trained change lost"
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.14.1 peft==0.21.2
cd "$dir"
"$dir/venv/bin/python" -W ignore::FutureWarning - <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import prune


def plain(layer: nn.Linear) -> nn.Linear:
    return layer


def pruned(layer: nn.Linear) -> nn.Linear:
    return prune.l1_unstructured(layer, "weight", amount=0.5)


torch.manual_seed(0)
x = torch.randn(4, 8)
for name, prepare in {"plain": plain, "weight_norm": nn.utils.weight_norm, "pruned": pruned}.items():
    model = nn.Sequential(prepare(nn.Linear(8, 8)), nn.GELU(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        pretrained = model(x)
        # random values of both matrices stand for what training leaves
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)).eval()
        trained = model(x)
        merged = model.merge_and_unload(safe_merge=True)(x)
    assert (trained - pretrained).abs().max() > 0.1
    as_trained, lost = torch.allclose(merged, trained, atol=1e-5), torch.equal(merged, pretrained)
    assert as_trained != lost and lost == (name != "plain")
    print(f"{name}: {'trained change lost' if lost else 'merged as trained'}")
PY
