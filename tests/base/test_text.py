"""Formatting of counts in messages."""

from __future__ import annotations

import pytest

from petune.base.text import capitalized, format_number, plural


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


@pytest.mark.parametrize(
    ("text", "expected"), [("top-1 on test", "Top-1 on test"), ("mAP", "mAP"), ("R²", "R²"), ("", "")]
)
def test_an_abbreviation_keeps_its_first_letter(text: str, expected: str) -> None:
    assert capitalized(text) == expected


def test_numbers_are_written_out() -> None:
    numbers = {
        0.12345: "0.1235",
        2003.4: "2003",
        117296.4: "117,296",
        -45678.0: "-45,678",
        1e-7: "1e-07",
        3e99: "3e+99",
    }
    assert {value: format_number(value) for value in numbers} == numbers
    assert format_number(float("nan")) == "nan"
