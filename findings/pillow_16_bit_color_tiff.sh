#!/usr/bin/env bash
# Pillow 12.3.0 opens a TIFF of three bands of 16 bits with photometric RGB, as satellites' and microscopes' software
# writes it (here tifffile 2026.3.3), in mode RGB with 8 bits: the low byte of every value is dropped, without a warning.
# One would expect the 16 bits, an error, or values scaled to the range. The same pixels as one gray band keep all 16 bits
# (mode I;16). Sensors of 12 bits use values up to 4,095, of which 16 levels are left; a dark scene becomes all black.
# Expected output: "written 0..4095, read as RGB: 0..15, 16 levels" and "one band: I;16 0..4095, 4096 levels"
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet pillow==12.3.0 tifffile==2026.3.3 numpy==2.4.6
cd "$dir"
"$dir/venv/bin/python" -W error - <<'PY'
import numpy as np
import tifffile
from PIL import Image

values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
tifffile.imwrite("color.tif", np.stack([values] * 3, -1), photometric="rgb")
tifffile.imwrite("gray.tif", values, photometric="minisblack")
color, gray = Image.open("color.tif"), Image.open("gray.tif")
read, kept = np.asarray(color), np.asarray(gray)
print(f"written 0..4095, read as {color.mode}: {read.min()}..{read.max()}, {len(np.unique(read))} levels")
print(f"one band: {gray.mode} {kept.min()}..{kept.max()}, {len(np.unique(kept))} levels")
assert color.mode == "RGB" and read.dtype == np.uint8
assert np.array_equal(read[..., 0], values >> 8)
assert gray.mode == "I;16" and np.array_equal(kept, values)
PY
