"""Figures as SVG or PNG: text stays text, colors follow a light or dark page, and the same data gives the same bytes.

Names of methods and classes can hold `$`, so matplotlib must not read any text as a formula; labels of axes are plain.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"
"""Stands for the color of text and lines; a page, or the style below, decides on the real one."""
LIGHT_INK, LIGHT_PAPER = "#1f2328", "#ffffff"
DARK_INK, DARK_PAPER = "#e6edf3", "#0d1117"
COLORS = ("#3b82d6", "#e07b39", "#3aa66b", "#d1495b", "#8e6bbf", "#a0764f", "#d972b0", "#7f8c8d", "#a8a033", "#2ba8b0")
"""Colors of the methods, in their order; readable on light and on dark."""
FONT_SIZE = 11.0
WIDTH = 4.4
"""Inches. Scaled to the width of a phone, text of `FONT_SIZE` points has about 12 pixels."""
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "petune",
    "text.parse_math": False,
    "axes.formatter.useoffset": False,
    "axes.formatter.use_mathtext": False,
    "font.size": FONT_SIZE,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.2,
    "legend.frameon": False,
}
FileType = Literal["svg", "png"]


def draw(content: Callable[[Figure], None], inches: tuple[float, float]) -> Figure:
    """Return a figure with petune's style.

    Args:
        content: Draws into the figure.
        inches: Width and height.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=inches, layout="constrained")
        FigureCanvasAgg(figure)  # measures text
        content(figure)
    return figure


def to_file(figure: Figure, file_type: FileType = "svg") -> bytes:
    """Return the content of an image file. An SVG is light or dark as the reader's system is; a PNG is light."""
    if file_type == "png":
        return _to_png(figure)
    style = (
        f"<style>svg {{ color: {LIGHT_INK}; }} .paper {{ fill: {LIGHT_PAPER}; }} "
        f"@media (prefers-color-scheme: dark) {{ svg {{ color: {DARK_INK}; }} .paper {{ fill: {DARK_PAPER}; }} }}"
        '</style>\n<rect class="paper" width="100%" height="100%"/>\n'
    )
    text = _to_svg(figure, "petune")
    end_of_tag = text.index(">", text.index("<svg")) + 1
    return (text[:end_of_tag] + "\n" + style + text[end_of_tag:].lstrip("\n")).encode()


def to_markup(figure: Figure, salt: str) -> str:
    """Return an SVG element for an HTML page, which gives it the color of its text.

    Args:
        figure: What to show.
        salt: Keeps ids apart from those of the page's other figures.
    """
    text = _to_svg(figure, salt)
    text = text[text.index("<svg") :]
    text = re.sub(r' id="[\w.]+_\d+"', "", text)
    size = re.compile(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>')
    return size.sub(r'<svg \1 role="img" xmlns:xlink="http://www.w3.org/1999/xlink">', text)


def _to_svg(figure: Figure, salt: str) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.S)
    return "\n".join(line.rstrip() for line in text.replace(INK, "currentColor").splitlines()) + "\n"


def _to_png(figure: Figure) -> bytes:
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=150, facecolor=LIGHT_PAPER, metadata={"Software": None})
    return buffer.getvalue()


def set_count_axis(axes: Axes, counts: list[int]) -> None:
    """Give axes a logarithmic x axis for numbers of parameters, labeled `1k`, `10k`, `1M`."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = min(counts), max(counts)
    margin = max(1.6, (high / low) ** 0.08)
    axes.set_xscale("log")
    axes.set_xlim(low / margin, high * margin)
    axes.xaxis.set_major_locator(FixedLocator(count_ticks(low / margin, high * margin)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, position: short_number(value)))


def count_ticks(low: float, high: float) -> list[float]:
    """Return three to six round numbers from `low` to `high`, for a logarithmic axis.

    Powers of ten if there are enough of them, else also their double and fivefold, else evenly spaced numbers.
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [factor * 10.0**decade for decade in decades for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            return ticks[:: math.ceil(len(ticks) / 6)]
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    step = next(factor * step for factor in (5, 2, 1) if (high - low) / (factor * step) >= 2)
    first = math.ceil(low / step)
    return [step * number for number in range(first, math.floor(high / step) + 1)]


def short_number(number: float) -> str:
    """Return `10k` for ten thousand, `2.5M` for two and a half million."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.4g}{unit}"
    return f"{number:.4g}"
