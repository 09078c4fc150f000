"""The page itself, in gradio: nothing is sent anywhere, nothing comes from the internet."""

from __future__ import annotations

import html
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from petune.base.errors import DataError, MissingExtra, UsageError
from petune.base.text import escape_markdown, printable
from petune.serving.demo.side_by_side import Answer, SideBySide

LARGEST_UPLOAD = "100mb"
KEPT_S = 3600  # uploaded images are deleted after an hour
FONTS = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}  # gradio's are fetched


@dataclass(frozen=True)
class Served:
    """A page that is being served: its address, and how to end it."""

    url: str
    page: Any

    def close(self) -> None:
        """Stop serving."""
        self.page.close(verbose=False)


def serve(demo: SideBySide, *, host: str = "127.0.0.1", port: int = 7860) -> Served:
    """Serve the page, in threads of its own.

    Args:
        demo: What is asked.
        host: Where to listen; the default answers this machine only.
        port: 0 takes any that is free.

    Raises:
        MissingExtra: gradio is not installed.
        UsageError: The port is taken, or the host is none of this machine's.
    """
    listening = _free(host, port)
    # asked for at import: a count of starts, a look whether there is a newer version
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    for name in ("no_proxy", "NO_PROXY"):  # gradio asks its own server whether it is up
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost"]))
    try:
        import gradio
    except ImportError:
        raise MissingExtra("petune demo", "demo") from None
    page = _page(gradio, demo)
    _, url, _ = page.launch(
        server_name=host, server_port=listening, share=False, inbrowser=False, quiet=True, prevent_thread_lock=True,
        ssr_mode=False, mcp_server=False, pwa=False, enable_monitoring=False, footer_links=[],
        max_file_size=LARGEST_UPLOAD, theme=gradio.themes.Default(**FONTS),
    )  # fmt: skip
    return Served(str(url), page)


def _free(host: str, port: int) -> int:
    """The port, or any that is free for 0.

    Raises:
        UsageError: It cannot be listened on.
    """
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise UsageError(
            f"--host and --port must be free to listen on, but {host}:{port} is not: {error.strerror or error}. Name "
            "another --port, or 0"
        ) from None


def _page(gradio: Any, demo: SideBySide) -> Any:
    with gradio.Blocks(title="petune demo", analytics_enabled=False, delete_cache=(KEPT_S, KEPT_S)) as page:
        gradio.Markdown(f"# One backbone, {_adapters(len(demo.names))}\n\n{escape_markdown(demo.backbone)}")
        problem = gradio.HTML(visible=False)
        with gradio.Row():
            image = gradio.File(label="Drop an image here", elem_id="image", height=200)
            seen = gradio.Image(label="Its square", interactive=False, height=200, buttons=[], elem_id="seen")
        labels, times = [], []
        with gradio.Row():
            for name in demo.names:
                with gradio.Column(min_width=240):
                    labels.append(gradio.Label(label=printable(name), num_top_classes=5))
                    times.append(gradio.Markdown(escape_markdown(demo.notes[name])))

        def ask(file: str | None) -> list[Any]:
            nothing = [None] * len(labels)
            notes = [escape_markdown(demo.notes[name]) for name in demo.names]
            if file is None:
                return [gradio.update(visible=False), None, *nothing, *notes]
            try:
                square, answers = demo(Path(file))
            except DataError as error:
                return [gradio.update(value=_alert(str(error)), visible=True), None, *nothing, *notes]
            found = [{printable(guess.name): guess.probability for guess in answer.top} for answer in answers]
            timed = [f"{note}<br>{_time(answer)}" for note, answer in zip(notes, answers, strict=True)]
            return [gradio.update(visible=False), square, *found, *timed]

        image.change(ask, image, [problem, seen, *labels, *times], api_visibility="private", show_progress="hidden")
    return page


def _adapters(number: int) -> str:
    return "one adapter" if number == 1 else f"{number} adapters"


def _time(answer: Answer) -> str:
    return f"{1000 * answer.time_s:.1f} ms for this image"


def _alert(text: str) -> str:
    words = html.escape(printable(text))
    return f'<p role="alert" style="border-left: 4px solid #b3261e; padding: .5rem .75rem; margin: 0">{words}</p>'
