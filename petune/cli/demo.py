"""`petune demo`: a page in the browser to try adapters on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from petune.cli.options import TrustCode, user_path
from petune.cli.predict import Device, Weights
from petune.cli.terminal import print_data, print_status

Sources = Annotated[
    list[Path], typer.Argument(metavar="DIR", help="Run or adapter directories, all of the same backbone.")
]
Host = Annotated[str, typer.Option("--host", metavar="ADDRESS", help="0.0.0.0 lets other machines in.")]
Port = Annotated[int, typer.Option("--port", metavar="INT", min=0, max=65535, help="0 takes any that is free.")]


def demo(
    sources: Sources,
    weights: Weights = None,
    device: Device = "auto",
    trust_remote_code: TrustCode = False,
    host: Host = "127.0.0.1",
    port: Port = 7860,
) -> None:
    """Serve a page to try adapters on images, side by side.

    Drop an image and see the top-5 of several adapters on one backbone.

    It answers this machine only, sends nothing anywhere and needs no network. Ctrl-C ends it.
    """
    from petune.serving.demo import SideBySide, serve

    paths = [user_path(source) for source in sources]
    served = serve(
        SideBySide(paths, weights=weights, device=device, trust_remote_code=trust_remote_code), host=host, port=port
    )
    print_data(served.url)
    print_status("Ctrl-C ends it")
    try:
        while True:
            time.sleep(3600)
    finally:
        served.close()
