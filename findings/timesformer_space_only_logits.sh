#!/usr/bin/env bash
# transformers 5.24.0: TimesformerForVideoClassification with attention_type="space_only" returns one row of logits for
# each frame (batch x frames, classes), although its docs and the other two kinds of attention give one for each video
# (batch, classes), and the paper (arXiv 2102.05095) averages over frames. Nothing says so: argmax over a batch gives
# frames x batch answers, and only training with labels fails, by the loss's complaint about batch sizes.
# Expected output: "divided_space_time (2, 5), joint_space_time (2, 5), space_only (8, 5)"
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.14.1 transformers==5.24.0
cd "$dir"
"$dir/venv/bin/python" - <<'PY'
import torch
from transformers import TimesformerConfig, TimesformerForVideoClassification

shapes = {}
for kind in ("divided_space_time", "joint_space_time", "space_only"):
    config = TimesformerConfig(
        image_size=32, patch_size=8, num_frames=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, num_labels=5, attention_type=kind,
    )
    model = TimesformerForVideoClassification(config).eval()
    with torch.no_grad():
        shapes[kind] = tuple(model(torch.randn(2, 4, 3, 32, 32)).logits.shape)
print(", ".join(f"{kind} {shape}" for kind, shape in shapes.items()))
assert shapes == {"divided_space_time": (2, 5), "joint_space_time": (2, 5), "space_only": (8, 5)}
PY
