"""Pages of images in Chromium: every image is decoded, nothing is loaded, nothing is wider than a phone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from petune.data import Dataset, Split, Target
from petune.runner.report.data_page import Sample, write_data_page

CHROMIUM = shutil.which("chromium")
MEASURE = """<script>onload = () => document.body.setAttribute("data-seen", JSON.stringify({
  widths: [...document.images].map(i => i.naturalWidth),
  others: performance.getEntriesByType("resource").map(e => e.name).filter(name => !name.startsWith("data:")),
  overflow: document.documentElement.scrollWidth - innerWidth,
}))</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_page_of_images(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 40, 40, 3), np.uint8)
    split = Split.of(images, np.arange(8) % 2)
    names = ("<img src=x onerror=alert(1)>", 20 * "long")
    dataset = Dataset("made", Target("class", names), "memory", "light", split, split.take(np.arange(0)), split)
    page = tmp_path / "page.html"
    write_data_page(dataset, page, Sample(image_size=40, num_images=6))
    page.write_text(page.read_text().replace('loading="lazy"', "") + MEASURE)
    words = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    words += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=500,900", "--dump-dom", f"file://{page}"]
    dom = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout
    found = re.search(r'data-seen="([^"]*)"', dom)
    assert found is not None
    seen = json.loads(html.unescape(found[1]))
    assert seen["widths"] == [40] * 24
    assert seen["others"] == []
    assert seen["overflow"] <= 0
