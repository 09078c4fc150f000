"""A web page to try adapters on: `petune demo DIR…`."""

from petune.serving.demo.page import Served, serve
from petune.serving.demo.side_by_side import Answer, SideBySide

__all__ = ["Answer", "Served", "SideBySide", "serve"]
