#!/usr/bin/env bash
# transformers 5.24.0: VivitVideoProcessor has no `offset` and always subtracts 1 after scaling, also when `offset=False`
# is passed or stands in the saved preprocessor's file; VivitImageProcessor respects it. So a ViViT that was trained on
# pixels from 0 to 1 gets them from -1 to 0 from the video processor, without a word, and predicts on shifted pixels.
# Expected output: "black pixels, offset=False: image processor 0.0, video processor -1.0"
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 transformers==5.24.0 pillow numpy
cd "$dir"
"$dir/venv/bin/python" - <<'PY'
import numpy as np
import torch
from transformers import VivitImageProcessor, VivitVideoProcessor

options = {"offset": False, "rescale_factor": 1 / 255, "do_normalize": False}
VivitImageProcessor(**options).save_pretrained("saved")
images = VivitImageProcessor.from_pretrained("saved")([np.zeros((224, 224, 3), np.uint8)] * 4, return_tensors="pt")
black = torch.zeros(4, 3, 224, 224, dtype=torch.uint8)
videos = VivitVideoProcessor.from_pretrained("saved")(black, return_tensors="pt")
given = VivitVideoProcessor(**options)(black, return_tensors="pt")
values = [float(batch["pixel_values"].max()) for batch in (images, videos, given)]
print(f"black pixels, offset=False: image processor {values[0]}, video processor {values[1]}")
assert values == [0.0, -1.0, -1.0], values
PY
