"""For mkdocs: pictures of results come along; other links that leave docs/ become text, since they lead nowhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def on_files(files: Files, config: Any) -> Files:
    """All files of docs/, and the pictures of benchmarks/results/."""
    for picture in sorted(RESULTS.glob("*/*.svg")):
        place = f"figures/{picture.parent.name}-{picture.name}"
        files.append(File.generated(config, place, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page without links to files outside docs/."""
    depth = page.file.src_uri.count("/")
    up = r"(?:\.\./){" + str(depth + 1) + "}"
    pictures = re.compile(rf"\({up}benchmarks/results/([^/)]+)/([^/)]+\.svg)\)")
    markdown = pictures.sub(rf"({'../' * depth}figures/\1-\2)", markdown)
    outside = re.compile(rf"\[([^\]]+)\]\({up}[^)]*\)")
    return outside.sub(lambda found: found[1] if "`" in found[1] else f"`{found[1]}`", markdown)
