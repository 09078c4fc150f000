"""For mkdocs: links that leave docs/ lead somewhere in the repository, but nowhere on the site; there they are text."""

from __future__ import annotations

import re
from typing import Any


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page without links to files outside docs/."""
    up = page.file.src_uri.count("/") + 1
    outside = re.compile(r"\[([^\]]+)\]\((?:\.\./){" + str(up) + r"}[^)]*\)")
    return outside.sub(lambda found: found[1] if "`" in found[1] else f"`{found[1]}`", markdown)
