"""`petune demo`: a web page to try adapters on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from petune.cli.options import Device, TrustRemoteCode, Weights, user_path
from petune.cli.terminal import print_data, print_status

Sources = Annotated[
    list[Path], typer.Argument(metavar="DIR", help="Run or adapter directories, all with the same backbone.")
]
Host = Annotated[
    str, typer.Option("--host", metavar="ADDRESS", help="Address to listen on; 0.0.0.0 accepts other machines.")
]
Port = Annotated[int, typer.Option("--port", metavar="NUMBER", min=0, max=65535, help="Port; 0 takes a free one.")]


def demo(
    sources: Sources,
    weights: Weights = None,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    host: Host = "127.0.0.1",
    port: Port = 7860,
) -> None:
    """Serve a web page that compares adapters side by side.

    Drop an image on it to see the top-5 classes of several adapters on one backbone.

    By default the page is available on this machine only. It sends nothing anywhere and needs no network. Stop it with
    Ctrl-C.
    """
    from petune.serving.demo import SideBySide, serve

    paths = [user_path(source) for source in sources]
    models = SideBySide(paths, weights=weights, device=device, trust_remote_code=trust_remote_code)
    server = serve(models, host=host, port=port)
    print_data(server.url)
    print_status("stop with Ctrl-C")
    try:
        while True:
            time.sleep(3600)
    finally:
        server.close()
