"""Build hook: give the README absolute links in the package's metadata, since PyPI cannot follow relative ones.

The base is `Source` in `[project.urls]` of pyproject.toml. Without it the links stay relative.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")


class CustomMetadataHook(MetadataHookInterface):
    """Fill in the dynamic field `readme`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the description of the package.

        Args:
            metadata: The `[project]` table.
        """
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        source = metadata.get("urls", {}).get("Source")
        if source:
            text = absolute_links(text, source, f"v{metadata['version']}")
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def absolute_links(text: str, source: str, tag: str) -> str:
    """Return Markdown whose relative links and images point into the repository.

    Args:
        text: The Markdown.
        source: The repository's address.
        tag: The tag or commit to point at.
    """

    def absolute(link: re.Match[str]) -> str:
        target = link["target"]
        if "://" in target or target.startswith(("#", "mailto:")):
            return link[0]
        kind = "raw" if link["image"] else "blob"
        return f"{link['image']}[{link['text']}]({source.rstrip('/')}/{kind}/{tag}/{target})"

    return LINK.sub(absolute, text)
