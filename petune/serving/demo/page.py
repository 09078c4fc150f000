"""The page of the demo, in gradio. It sends nothing anywhere, and loads nothing from the internet."""

from __future__ import annotations

import contextlib
import html
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petune.base.errors import MissingExtra, PetuneError, UsageError
from petune.base.text import escape_markdown, format_number, printable
from petune.serving.demo.side_by_side import Answer, SideBySide
from petune.serving.predictions import Prediction

MAX_UPLOAD = "100mb"
KEEP_UPLOADS_S = 3600
MAX_BARS = 20
"""Labels of an image that are shown; classes are the five most probable ones."""
MAX_TEXT = 500
MAX_COLUMNS = 4
"""Adapters next to each other on a wide screen."""
FONTS = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}  # gradio downloads its own


@dataclass(frozen=True)
class Served:
    """A page that is being served, and its address."""

    url: str
    page: Any

    def close(self) -> None:
        """Stop serving."""
        self.page.close(verbose=False)


def serve(demo: SideBySide, *, host: str = "127.0.0.1", port: int = 7860) -> Served:
    """Serve the page, in separate threads.

    Args:
        demo: The adapters to try.
        host: Address to listen on; the default answers this machine only.
        port: 0 chooses a free port.

    Raises:
        MissingExtra: gradio is not installed.
        UsageError: The port is taken, or the address is not one of this machine's.
    """
    free_port = _free_port(host, port)
    with _gradio_environment():
        try:
            import gradio
        except ImportError:
            raise MissingExtra("petune demo", "demo") from None
        page = _build_page(gradio, demo)
        _, url, _ = page.launch(
            server_name=host,
            server_port=free_port,
            share=False,
            inbrowser=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            enable_monitoring=False,
            footer_links=[],
            max_file_size=MAX_UPLOAD,
            theme=gradio.themes.Default(**FONTS),
        )
    return Served(str(url), page)


@contextlib.contextmanager
def _gradio_environment() -> Iterator[None]:
    """Turn off what gradio sends when imported, and let it reach its own server without a proxy."""
    changed = {"GRADIO_ANALYTICS_ENABLED": "False"}
    for name in ("no_proxy", "NO_PROXY"):
        changed[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost"]))
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _free_port(host: str, port: int) -> int:
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}:{port}: {error.strerror or error}. Use another port, or 0 for any free one",
            cli_hint="Set it with --port",
        ) from None


def _build_page(gradio: Any, demo: SideBySide) -> Any:
    notes = {name: escape_markdown(demo.notes[name]) for name in demo.names}
    keep = (KEEP_UPLOADS_S, KEEP_UPLOADS_S)
    with gradio.Blocks(title="petune demo", analytics_enabled=False, delete_cache=keep) as page:
        count = "one adapter" if len(notes) == 1 else f"{len(notes)} adapters"
        gradio.Markdown(f"# One backbone, {count}\n\n{escape_markdown(demo.backbone)}")
        alert = gradio.HTML(visible=False)
        with gradio.Row():
            upload = gradio.File(label="Drop an image here", elem_id="image", height=200)
            square = gradio.Image(
                label="What the model sees", interactive=False, height=200, buttons=[], elem_id="square"
            )
        labels, captions, overlays = [], [], []
        for row in _rows(demo.names):
            with gradio.Row():
                for name in row:
                    with gradio.Column(min_width=240):
                        if not name:
                            continue
                        labels.append(gradio.Label(label=printable(name), num_top_classes=MAX_BARS))
                        captions.append(gradio.Markdown(notes[name]))
                        shown = {"visible": demo.has_mask(name), "height": 320, "buttons": []}
                        overlays.append(gradio.Image(label="Mask", interactive=False, **shown))

        def answer(file: str | None) -> list[Any]:
            hidden = gradio.update(visible=False)
            nothing = [None, *[None] * len(labels), *notes.values(), *[None] * len(overlays)]
            if file is None:
                return [hidden, *nothing]
            try:
                image, answers = demo(Path(file))
            except PetuneError as error:
                return [gradio.update(value=_alert(str(error)), visible=True), *nothing]
            shown = [label_of(one.prediction) for one in answers]
            texts = [_caption(notes[one.name], one) for one in answers]
            return [hidden, image, *shown, *texts, *(one.overlay for one in answers)]

        outputs = [alert, square, *labels, *captions, *overlays]
        upload.change(answer, upload, outputs, api_visibility="private", show_progress="hidden")
    return page


def _rows(names: Sequence[str]) -> list[list[str]]:
    """Return the adapters of each row of the page; the last row is filled up, so that all columns have one width."""
    width = len(names) if len(names) <= MAX_COLUMNS else MAX_COLUMNS - 1
    rows = [list(names[start : start + width]) for start in range(0, len(names), width)]
    rows[-1] += [""] * (width - len(rows[-1]))
    return rows


def label_of(prediction: Prediction) -> dict[str, float] | str:
    """Return what a label of gradio shows: probabilities as bars, or a text."""
    if prediction.top:
        return {printable(name): probability for name, probability in prediction.top}
    if prediction.kind == "mask":
        return {printable(name): share for name, share in (prediction.fractions or {}).items()}
    if prediction.kind == "labels":
        return "none"
    if prediction.kind == "numbers":
        numbers = (prediction.numbers or {}).items()
        return ", ".join(f"{printable(name)} {format_number(number, 5)}" for name, number in numbers)
    return printable(str(prediction.output))[:MAX_TEXT]


def _caption(note: str, answer: Answer) -> str:
    return f"{note}<br>{1000 * answer.time_s:.1f} ms for this image"


def _alert(message: str) -> str:
    text = html.escape(printable(message))
    return f'<p role="alert" style="border-left: 4px solid #b3261e; padding: .5rem .75rem; margin: 0">{text}</p>'
