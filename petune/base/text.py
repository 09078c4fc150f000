"""Numbers and names as text, for terminals, pages, notebooks and cards: no control characters, no live markup."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

_MARKDOWN = re.compile(r"([\\`*_\[\]{}|#~!$])")


def size(num_bytes: float) -> str:
    """`4.6 MB`: decimal units, as on a disk."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def duration(time_s: float) -> str:
    """`1 h 04 min`, `12 min 05 s` or `8.1 s`."""
    if time_s >= 3600:
        return f"{int(time_s // 3600)} h {int(time_s % 3600 // 60):02d} min"
    return f"{int(time_s // 60)} min {int(time_s % 60):02d} s" if time_s >= 60 else f"{time_s:.1f} s"


def percent(value: float | None, digits: int = 2) -> str:
    """`12.3456` → `12.35 %`; `-` for None."""
    return "-" if value is None else f"{value:.{digits}f} %"


def visible(text: str) -> str:
    """The text without control and bidirectional characters, which names may bring; lines stay."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def without_folders(text: str, *, is_path: bool = False) -> str:
    """`folder:/home/me/pets` → `folder:pets`: what others are to read does not say where it lay here.

    Args:
        is_path: Whether a text that could be a hub's `user/name` is a path; `../name` and `a/b/c` always are.
    """
    kind = next((kind for kind in ("folder:", "hf:") if text.startswith(kind)), "")
    place = text.removeprefix(kind)
    if is_path or kind == "folder:" or place.startswith(("/", "~", ".")) or place.count("/") > 1:
        return f"{kind}{place.rstrip('/').rpartition('/')[2]}"
    return text


def in_markdown(text: str) -> str:
    """The text on one line, shown by Markdown as it is: neither HTML nor emphasis, links, tables or headings."""
    line = " ".join(visible(text).split())
    escaped = _MARKDOWN.sub(r"\\\1", line).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return escaped.replace("://", ":&#8203;//")  # bare addresses become links, and trackers, without any markup


def drawable(text: str) -> str:
    """What matplotlib's font can draw."""
    return "".join(c if c.isprintable() and ord(c) < 0x250 else "?" for c in text)


def html_table(rows: Iterable[Sequence[str]], columns: Sequence[str] = (), caption: str = "") -> str:
    """A table for a notebook; every text is escaped. Without `columns` the first cell of a row is its heading."""

    def cell(tag: str, text: str, side: str) -> str:
        return f'<{tag} style="text-align: {side}">{html.escape(visible(text))}</{tag}>'

    lines = [f"<caption>{html.escape(visible(caption))}</caption>"] if caption else []
    if columns:
        heads = (cell("th", name, "right" if i else "left") for i, name in enumerate(columns))
        lines.append(f"<thead><tr>{''.join(heads)}</tr></thead>")
    side = "right" if columns else "left"
    body = (
        "".join((cell("th", first, "left"), *(cell("td", text, side) for text in others))) for first, *others in rows
    )
    lines.append(f"<tbody>{''.join(f'<tr>{row}</tr>' for row in body)}</tbody>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"
