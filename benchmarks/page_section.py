"""Exchange the part of a page that a program writes."""

from __future__ import annotations

import re
from pathlib import Path


def with_section(page: Path, begin: str, end: str, content: str) -> str:
    """Return the text of a page with `content` between two markers.

    Args:
        page: The file.
        begin, end: The markers, which stay.
        content: What comes between them.

    Raises:
        SystemExit: The page does not have the markers once each.
    """
    text = page.read_text(encoding="utf-8")
    new, count = re.subn(f"{begin}.*?{end}", lambda _: begin + content + end, text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{page} needs the markers {begin.strip()} and {end.strip()}, once each")
    return new
