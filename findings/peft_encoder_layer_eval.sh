#!/usr/bin/env bash
# peft 0.21.2 with torch 2.14.1: LoRA on linear1 and linear2 of nn.TransformerEncoderLayer trains, and does nothing in
# eval mode. In train mode the layer calls the wrapped linear layers. In eval mode it may hand their weights to one fused
# kernel, and PEFT's wrapper answers `linear1.weight` with the weight of the frozen layer; the layer looks for trained
# weights and for hooks before it does so, and finds none. So loss and gradients are right, and every prediction after
# model.eval() is the one of the pretrained model, without a word; LoRA on `self_attn` is lost in the same way. What was
# trained is all there: merge_and_unload() brings it into eval mode.
# Expected output: "train mode: changed, eval mode: the same as without LoRA, merged: changed" for each of the two targets
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.14.1 peft==0.21.2
cd "$dir"
"$dir/venv/bin/python" - <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from torch import nn


def changed(model: nn.Module, before: torch.Tensor) -> str:
    with torch.no_grad():
        return "changed" if (model(tokens) - before).abs().max() > 0.01 else "the same as without LoRA"


torch.manual_seed(0)
tokens, goal = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
for targets in (["linear1", "linear2"], ["self_attn"]):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), 2)
    with torch.no_grad():
        before = encoder.eval()(tokens)
    model = get_peft_model(encoder, LoraConfig(r=4, target_modules=targets)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(50):
        optimizer.zero_grad()
        (model(tokens) - goal).square().mean().backward()
        optimizer.step()
    modes = [changed(model.train(), before), changed(model.eval(), before)]
    merged = changed(model.merge_and_unload().eval(), before)
    print(f"{', '.join(targets)}: train mode: {modes[0]}, eval mode: {modes[1]}, merged: {merged}")
    assert (*modes, merged) == ("changed", "the same as without LoRA", "changed")
PY
