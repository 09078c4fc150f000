"""What `pip install petune` brings: every file of the package, its entry points, licence, types and extras."""

from __future__ import annotations

import configparser
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from importlib.metadata import version
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement

import hatch_build

ROOT = Path(__file__).parents[1]
EXTRAS = {
    "data", "demo", "dev", "docs", "mlflow", "onnx", "quantized", "ray", "slurm", "sweep", "tensorboard", "trackio",
    "transformers", "video", "wandb",
}  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel that `python -m build` makes, built without downloading anything."""
    place = tmp_path_factory.mktemp("dist")
    return zipfile.ZipFile(next(WheelBuilder(str(ROOT)).build(directory=str(place), versions=["standard"])))


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    return Parser().parsestr(_information(wheel, "METADATA").decode())


def _information(wheel: zipfile.ZipFile, name: str) -> bytes:
    return wheel.read(next(n for n in wheel.namelist() if n.endswith(f".dist-info/{name}")))


def test_every_file_of_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    files = (p for p in (ROOT / "petune").rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    assert inside == {str(p.relative_to(ROOT)) for p in files}
    assert {"petune/py.typed", "petune/backbones/pretrained/vit_nano_cifar100.safetensors"} <= inside
    for name in ("petune/backbones/pretrained/vit_nano_cifar100.safetensors", "petune/runner/report/report.html.jinja"):
        assert wheel.read(name) == (ROOT / name).read_bytes()


def test_entry_points(wheel: zipfile.ZipFile) -> None:
    points = configparser.ConfigParser()
    points.optionxform = str  # type: ignore[assignment,method-assign]
    points.read_string(_information(wheel, "entry_points.txt").decode())
    assert dict(points["console_scripts"]) == {"petune": "petune.__main__:main"}
    assert {"adaptformer", "vpt", "lora", "linear", "full"} <= set(points["petune.tuners"])
    for target in (t for group in points.sections() for t in points[group].values()):
        module = target.partition(":")[0].replace(".", "/")
        assert {f"{module}.py", f"{module}/__init__.py"} & set(wheel.namelist()), target


def test_licence_and_classifiers(wheel: zipfile.ZipFile, metadata: Message) -> None:
    assert metadata["License-Expression"] == "Apache-2.0"
    text = _information(wheel, "licenses/LICENSE").decode()
    assert "Apache License" in text
    assert text == (ROOT / "LICENSE").read_text()
    assert "Typing :: Typed" in (metadata.get_all("Classifier") or [])
    assert metadata["Version"] == version("petune")


def test_the_description_is_the_readme(metadata: Message) -> None:
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()


def test_links_of_the_readme_can_be_made_absolute_for_pypi() -> None:
    text = hatch_build.absolute_links((ROOT / "README.md").read_text(encoding="utf-8"), "https://x.org/petune/", "v1.2")
    targets = [link["target"] for link in hatch_build.LINK.finditer(text)]
    assert "https://x.org/petune/blob/v1.2/CONTRIBUTING.md" in targets
    assert [t for t in targets if t.endswith(".svg") and not t.startswith("https://x.org/petune/raw/v1.2/")] == []
    assert [t for t in targets if "://" not in t and not t.startswith("#")] == []


def test_extras_name_packages_that_are_asked_for(metadata: Message) -> None:
    needs = [Requirement(text) for text in metadata.get_all("Requires-Dist") or []]
    extras = set(metadata.get_all("Provides-Extra") or [])
    assert extras == EXTRAS
    for extra in extras:
        assert [r for r in needs if r.marker is not None and r.marker.evaluate({"extra": extra})], extra
    assert all(r.specifier or r.name.startswith("types-") for r in needs), "each says how old it may be"


def test_messages_name_extras_that_exist() -> None:
    import re

    named = set()
    for file in (ROOT / "petune").rglob("*.py"):
        named |= set(re.findall(r'MissingExtra\(\s*[^,)]+,\s*"([\w-]+)"', file.read_text(encoding="utf-8")))
    assert {"onnx", "transformers"} <= named <= EXTRAS


def test_the_source_distribution_builds_the_same(tmp_path: Path, wheel: zipfile.ZipFile) -> None:
    file = next(SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"]))
    with tarfile.open(file) as archive:
        archive.extractall(tmp_path / "src", filter="data")
    source = next((tmp_path / "src").iterdir())
    again = next(WheelBuilder(str(source)).build(directory=str(tmp_path), versions=["standard"]))
    assert set(zipfile.ZipFile(again).namelist()) == set(wheel.namelist())
