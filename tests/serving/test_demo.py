"""The demo: the same answers as `predict`; the page in a browser, broken images, no requests to the internet."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

import petune
from petune.base.errors import BackboneMismatch, DataError, UsageError
from petune.base.files import write_directory
from petune.data import load_dataset
from petune.serving.demo import SideBySide, serve
from petune.serving.predict import Predictor
from tests.program import call
from tests.trained import changed

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def other(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits' adapter with other class names, one of which is markup."""
    names = ["<img src=x onerror=alert(1)>", *"abcdefghi"]
    return changed(digits / "adapter", tmp_path_factory.mktemp("b") / "letters" / "adapter", classes=names)


@pytest.fixture(scope="module")
def both(digits: Path, other: Path) -> SideBySide:
    return SideBySide([digits, other.parent], device="cpu")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    test = load_dataset("digits").test
    Image.fromarray(test.images[test.rows[0]]).save(tmp_path / "digit.png")
    return tmp_path / "digit.png"


def test_the_same_answers_as_predict(both: SideBySide, digits: Path, image: Path) -> None:
    assert both.names == ["run", "letters"]
    square, (one, two) = both(image)
    assert square.shape == (320, 320, 3)
    (alone,) = Predictor(digits, device="cpu")([image])
    assert [g.name for g in one.prediction.top] == [g.name for g in alone.top]
    np.testing.assert_allclose(
        [g.probability for g in one.prediction.top], [g.probability for g in alone.top], rtol=1e-5
    )
    assert [g.probability for g in two.prediction.top] == [g.probability for g in one.prediction.top]
    assert one.time_s > 0
    assert "adaptformer:bottleneck=4 for digits, " in both.notes["run"]


def test_unreadable_images_are_named(both: SideBySide, image: Path) -> None:
    image.write_bytes(image.read_bytes()[:60])
    with pytest.raises(DataError, match=r"^digit\.png: not a readable image") as caught:
        both(image)
    assert "on_broken" not in str(caught.value)


def test_adapters_that_do_not_fit_together(digits: Path, other: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="given twice"):
        SideBySide([digits, digits / "adapter"])
    config = json.loads((other / "adapter_config.json").read_text())
    files = {file.name: file.read_bytes() for file in other.iterdir() if file.name != "manifest.json"}
    config["fingerprint"] = "0" * 64
    write_directory(tmp_path / "far", {**files, "adapter_config.json": json.dumps(config).encode()})
    with pytest.raises(BackboneMismatch, match="far does not fit the backbone of run"):
        SideBySide([digits, tmp_path / "far"], device="cpu")


@pytest.mark.exhaustive
def test_adapters_with_other_heads_do_not_fit(digits: Path, tmp_path: Path) -> None:
    """Neither the number of attention heads nor the kind of classifier is in the fingerprint."""
    shape: dict[str, Any] = {"depth": 2, "embed_dim": 48}
    run: dict[str, Any] = {
        "backbone": "vit_nano", "weights": "none", "dataset": "digits", "shots": 3, "device": "cpu",
        "train": {"epochs": 1, "precision": "fp32"},
    }  # fmt: skip
    petune.run(**run, method="bitfit", backbone_options=shape, output=tmp_path / "bitfit")
    assert SideBySide([digits, tmp_path / "bitfit"], device="cpu").names == ["run", "bitfit"]
    petune.run(**run, method="bitfit", backbone_options={**shape, "num_heads": 6}, output=tmp_path / "heads")
    petune.run(**run, method="linear", backbone_options=shape, head="bn_linear", output=tmp_path / "bn")
    for name in ("heads", "bn"):
        with pytest.raises(BackboneMismatch, match=f"{name} does not fit the backbone of run"):
            SideBySide([digits, tmp_path / name], device="cpu")


def test_a_taken_port_is_reported(both: SideBySide) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"127\.0\.0\.1:{port}"):
            serve(both, port=port)


def test_an_adapter_given_twice(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = call("demo", digits, digits / "adapter", capture=capsys)
    assert (done.code, "given twice" in done.err) == (2, True)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """Chromium that reports every request it makes."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (CHROMIUM and DRIVER):
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 "--window-size=1280,900", f"--user-data-dir={tmp_path / 'profile'}"):  # fmt: skip
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def url(digits: Path, other: Path, tmp_path: Path) -> Iterator[str]:
    """The address of the page that `petune demo` serves."""
    pytest.importorskip("gradio")
    words = [sys.executable, "-m", "petune", "demo", digits, other.parent, "--device=cpu", "--port=0"]
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(tmp_path / "uploads")}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as served:
        assert served.stdout
        try:
            yield served.stdout.readline().strip()
        finally:
            served.terminate()  # SIGINT may be ignored: a shell's background jobs have it so


def hosts(browser: Any) -> set[str]:
    """Return the hosts that the browser sent requests to."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return {urlsplit(url).hostname or "" for url in sent if url.startswith(("http", "ws"))}


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")  # selenium warns of much
def test_the_page(url: str, both: SideBySide, image: Path, browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    def text() -> str:
        return str(browser.find_element("tag name", "body").text)

    def drop(file: Path, until: str) -> str:
        browser.get(url)
        WebDriverWait(browser, 60).until(lambda b: b.find_elements("css selector", "#image input[type=file]"))
        browser.find_element("css selector", "#image input[type=file]").send_keys(str(file))
        WebDriverWait(browser, 60).until(lambda _: until in text())
        return text()

    assert url.startswith("http://127.0.0.1:")
    shown = drop(image, "ms for this image")
    _, answers = both(image)
    assert all(guess.name in shown for answer in answers for guess in answer.prediction.top)
    assert shown.count("ms for this image") == 2
    assert browser.find_elements("css selector", "img[src=x]") == []
    browser.save_screenshot(str(tmp_path / "page.png"))
    bad = tmp_path / "bad<b>.png"
    bad.write_bytes(image.read_bytes()[:60])
    assert "ms for this image" not in drop(bad, "not a readable image")
    browser.save_screenshot(str(tmp_path / "bad.png"))
    huge = tmp_path / "huge.png"
    Image.new("1", (20_000, 10_000)).save(huge)
    assert "exceeds limit" in drop(huge, "huge.png: not a readable image")
    assert hosts(browser) == {"127.0.0.1"}
