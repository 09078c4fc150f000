"""Hooks of mkdocs: include the figures of benchmarks/results/, and turn other links that leave docs/ into text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def on_files(files: Files, config: Any) -> Files:
    """Return all files of docs/, and the figures of benchmarks/results/."""
    for image in sorted(RESULTS.glob("*/*.svg")):
        path = f"figures/{image.parent.name}-{image.name}"
        files.append(File.generated(config, path, abs_src_path=str(image)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the page without links to files outside of docs/."""
    depth = page.file.src_uri.count("/")
    up = r"(?:\.\./){" + str(depth + 1) + "}"
    images = re.compile(rf"\({up}benchmarks/results/([^/)]+)/([^/)]+\.svg)\)")
    markdown = images.sub(rf"({'../' * depth}figures/\1-\2)", markdown)
    outside = re.compile(rf"\[([^\]]+)\]\({up}[^)]*\)")
    return outside.sub(lambda found: found[1] if "`" in found[1] else f"`{found[1]}`", markdown)
