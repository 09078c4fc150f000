"""Formatting of counts in messages."""

from __future__ import annotations

import pytest

from petune.base.text import plural


@pytest.mark.parametrize(
    ("count", "noun", "several", "text"),
    [
        (1, "image", "", "1 image"),
        (0, "image", "", "0 images"),
        (1024, "image", "", "1,024 images"),
        (1, "class", "classes", "1 class"),
        (3, "class", "classes", "3 classes"),
    ],
)
def test_a_noun_agrees_with_its_count(count: int, noun: str, several: str, text: str) -> None:
    assert plural(count, noun, several) == text
