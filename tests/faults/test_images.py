"""Images of random bytes, and good ones with a few bytes changed: an image comes out, or one error with the path."""

from __future__ import annotations

import io
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from petune.data.images import decode_images
from tests.faults.conftest import tally, tries

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")


def good(kind: str, chance: random.Random) -> bytes:
    pixels = np.frombuffer(chance.randbytes(24 * 20 * 3), np.uint8).reshape(24, 20, 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def mutated(content: bytes, chance: random.Random) -> bytes:
    """A few bytes replaced, a piece taken out, or a piece put in."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 6)):
        at, length = chance.randrange(len(data)), chance.randint(1, 8)
        if chance.random() < 0.6:
            data[at] = chance.randrange(256)
        elif chance.random() < 0.5 and len(data) > 40:
            del data[at : at + length]
        else:
            data[at:at] = chance.randbytes(length)
    return bytes(data)


@pytest.mark.parametrize("kind", [*FORMATS, "random"])
def test_mutated_images(kind: str, tmp_path: Path) -> None:
    chance, count = random.Random(kind), tries(60, 2000)
    paths = []
    for number in range(count):
        content = chance.randbytes(chance.randint(0, 300)) if kind == "random" else mutated(good(kind, chance), chance)
        paths.append(tmp_path / f"{number}.{'png' if kind == 'random' else kind.lower()}")
        paths[-1].write_bytes(content)
    out = np.full((count, 16, 16, 3), 7, np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        broken = decode_images(paths, out)
    named = sum(str(paths[i]) in message and "\n" not in message for i, message in broken.items())
    black = sum(not out[i].any() for i in broken)
    held = count - len(broken) + min(named, black)
    tally(
        f"{kind} images of {'random bytes' if kind == 'random' else 'changed bytes'}",
        "an image, or one error with its path",
        count,
        held,
    )
