"""Format numbers, and escape names for terminals, HTML, Markdown and plots."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

_DATASET_KIND = re.compile(r"[a-z]\w+:(?!//)")
_MARKDOWN = re.compile(r"([\\`*_\[\]{}|#~!$])")


LARGEST_WRITTEN_OUT = 1e15
"""Larger numbers are written with an exponent."""


def format_size(num_bytes: float) -> str:
    """Return `4.6 MB`, in decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def format_duration(time_s: float) -> str:
    """Return `1 h 04 min`, `12 min 05 s` or `8.1 s`."""
    if time_s >= 3600:
        return f"{int(time_s // 3600)} h {int(time_s % 3600 // 60):02d} min"
    return f"{int(time_s // 60)} min {int(time_s % 60):02d} s" if time_s >= 60 else f"{time_s:.1f} s"


def has_top5(num_classes: int | None) -> bool:
    """Return True if a top-5 accuracy is worth showing: with five classes or fewer it is always 100 %.

    Args:
        num_classes: None if it is not known; then top-5 is shown.
    """
    return num_classes is None or num_classes > 5


def plural(count: int, noun: str, several: str = "") -> str:
    """Return `1 image`, or `1,024 images`.

    Args:
        count: How many.
        noun: For one of them.
        several: For another number; by default `noun` with an s.
    """
    return f"{count:,} {noun if count == 1 else several or f'{noun}s'}"


def shortened(texts: Sequence[str], most: int) -> str:
    """Return the first `most` texts with commas between them, and "…" for the others."""
    return ", ".join(texts[:most]) + (", …" if len(texts) > most else "")


def capitalized(text: str) -> str:
    """Return the text with a capital at its start, as `Top-1 on test`; an abbreviation such as `mAP` stays as it is."""
    return text if text[1:2].isupper() else f"{text[:1].upper()}{text[1:]}"


def format_percent(value: float | None, digits: int = 2) -> str:
    """Return `12.35 %` for 12.3456, `-` for None."""
    return "-" if value is None else f"{value:.{digits}f} %"


def format_number(value: float, digits: int = 4) -> str:
    """Return a number with some significant digits; whole numbers of more digits are written out: `117,300`."""
    text = f"{value:.{digits}g}"
    return f"{value:,.0f}" if "e+" in text and abs(value) < LARGEST_WRITTEN_OUT else text


def printable(text: str) -> str:
    """Replace control and bidirectional characters by spaces, except line breaks."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def hide_folders(text: str, *, is_path: bool = False) -> str:
    """Return `folder:pets` for `folder:/home/me/pets`, so that published text does not show local paths.

    Args:
        text: A dataset, weights or backbone as configured.
        is_path: Treat `user/name`, which may be a hub id, as a path; `../name` and `a/b/c` always are one.
    """
    match = _DATASET_KIND.match(text)
    kind = match[0] if match else ""
    path = text.removeprefix(kind)
    if kind not in ("", "folder:", "hf:"):  # such as table:FILE,label=breed
        return kind + re.sub(r"(^|[,=\[])[^,=\[\]]*/", r"\1", path)
    if is_path or kind == "folder:" or path.startswith(("/", "~", ".")) or path.count("/") > 1:
        return f"{kind}{path.rstrip('/').rpartition('/')[2]}"
    return text


def escape_markdown(text: str) -> str:
    """Return the text on one line, escaped so that Markdown shows it literally."""
    line = " ".join(printable(text).split())
    escaped = _MARKDOWN.sub(r"\\\1", line).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return escaped.replace("://", ":&#8203;//")  # bare URLs would become links


def matplotlib_text(text: str) -> str:
    """Replace characters that matplotlib's default font lacks by `?`."""
    return "".join(c if c.isprintable() and ord(c) < 0x250 else "?" for c in text)


def html_table(rows: Iterable[Sequence[str]], columns: Sequence[str] = (), caption: str = "") -> str:
    """Return an HTML table for a notebook, escaped. Without `columns` the first cell of each row is its heading."""

    def cell(tag: str, text: str, side: str) -> str:
        return f'<{tag} style="text-align: {side}">{html.escape(printable(text))}</{tag}>'

    lines = [f"<caption>{html.escape(printable(caption))}</caption>"] if caption else []
    if columns:
        heads = (cell("th", name, "right" if i else "left") for i, name in enumerate(columns))
        lines.append(f"<thead><tr>{''.join(heads)}</tr></thead>")
    side = "right" if columns else "left"
    body = (
        "".join((cell("th", first, "left"), *(cell("td", text, side) for text in others))) for first, *others in rows
    )
    lines.append(f"<tbody>{''.join(f'<tr>{row}</tr>' for row in body)}</tbody>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"
