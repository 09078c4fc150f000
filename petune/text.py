"""Names from outside (classes, files, models) as text: no control characters, no markup that would take effect."""

from __future__ import annotations

import re

_MARKDOWN = re.compile(r"([\\`*_\[\]{}|#~!$])")


def visible(text: str) -> str:
    """The text without control and bidirectional characters; lines stay."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def in_markdown(text: str) -> str:
    """The text on one line, shown by Markdown as it is: neither HTML nor emphasis, links, tables or headings."""
    line = " ".join(visible(text).split())
    escaped = _MARKDOWN.sub(r"\\\1", line).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return escaped.replace("://", ":&#8203;//")  # bare addresses become links, and trackers, without any markup
