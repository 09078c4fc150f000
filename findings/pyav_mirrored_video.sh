#!/usr/bin/env bash
# PyAV 18.1.0: frame.rotation is 180 for a video whose file says "mirrored from left to right", and 0 for one that is
# mirrored from top to bottom. Turning frames by frame.rotation, as one does for a phone's videos, shows the first upside
# down and leaves the second as it was stored, without a word. The matrix itself is in
# frame.side_data["DISPLAYMATRIX"]; an angle alone cannot say that a video is mirrored.
# The script encodes a video and writes the matrix into its track header, as editors and front cameras do.
# Expected output: "plain 0, turned by 180: 180, mirrored left-right: 180, mirrored top-bottom: 0"
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet av==18.1.0 numpy==2.4.6
cd "$dir"
"$dir/venv/bin/python" -W error - <<'PY'
import struct
from pathlib import Path

import av
import numpy as np

with av.open("plain.mp4", "w") as container:
    stream = container.add_stream("mpeg4", rate=8)
    stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
    for _ in range(2):
        frame = av.VideoFrame.from_ndarray(np.zeros((64, 96, 3), np.uint8), format="rgb24")
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def rotation(across: int, down: int) -> int:
    content = bytearray(Path("plain.mp4").read_bytes())
    start = content.index(b"tkhd") + 44
    left, top = (96 if across < 0 else 0), (64 if down < 0 else 0)
    values = (across << 16, 0, 0, 0, down << 16, 0, left << 16, top << 16, 1 << 30)
    content[start : start + 36] = struct.pack(">9i", *values)
    Path("marked.mp4").write_bytes(content)
    with av.open("marked.mp4") as container:
        return round(next(container.decode(video=0)).rotation) % 360


found = rotation(1, 1), rotation(-1, -1), rotation(-1, 1), rotation(1, -1)
print("plain {}, turned by 180: {}, mirrored left-right: {}, mirrored top-bottom: {}".format(*found))
assert found == (0, 180, 180, 0), found
PY
