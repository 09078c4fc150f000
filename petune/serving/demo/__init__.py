"""Try adapters on images in the browser: `petune demo DIR…`."""

from petune.serving.demo.page import Served, serve
from petune.serving.demo.side_by_side import Answer, SideBySide

__all__ = ["Answer", "Served", "SideBySide", "serve"]
