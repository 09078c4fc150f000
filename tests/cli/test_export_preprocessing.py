"""ONNX with the preprocessing inside: images of any size, form and task give what `petune.predict` gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import petune as public
from petune.data.bands import ImageForm
from petune.data.preprocess import Preprocess
from petune.serving.export.image_check import ImageCheck
from petune.serving.export.onnx_preprocess import preprocessing_model
from petune.serving.image_transform import ImageTransform
from tests.trained import CLASSES, changed, saved_run

Run = Callable[..., Any]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = ((320, 214), (33, 32), (32, 32), (9, 200), (1, 1), (500, 501), (225, 193), (7, 260), (641, 480))
"""Width and height: smaller and larger than the model's, odd, and thin."""


def _difference(transform: ImageTransform, images: list[NDArray[Any]]) -> float:
    """Return the largest difference from petune's own pixels, in levels of 255."""
    import onnx
    import onnxruntime

    empty = onnx.helper.make_graph([], "empty", [], [])
    like = onnx.helper.make_model(empty, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    proto = preprocessing_model(transform, "pixels", like)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    largest = 0.0
    for image in images:
        squares, errors = transform.squares([image])
        assert not errors
        expected = transform.batch(squares, torch.device("cpu")).numpy()
        got = session.run(None, {"image": image})[0]
        assert got.shape == expected.shape
        levels = np.array(transform.preprocess.std).reshape(1, -1, 1, 1) * 255
        largest = max(largest, float(np.abs((got - expected) * levels).max()))
    return largest


def test_pixels_of_photos() -> None:
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(image) for image in load_sample_images().images]
    resized = [photos[i % 2].resize(size, Image.Resampling.BICUBIC) for i, size in enumerate(SIZES)]
    images = [*(np.asarray(image) for image in resized), np.asarray(photos[0])]
    for stored, crop, size, mean, std in (
        (37, 0.875, 32, MEAN, STD),
        (32, 1.0, 64, MEAN, STD),
        (64, 1.0, 48, (0.5,), (0.25,)),
    ):
        transform = ImageTransform(Preprocess(size, mean, std), stored, crop)
        assert _difference(transform, images) < 1e-3


def test_pixels_of_other_channels() -> None:
    generator = np.random.default_rng(0)
    for channels, dtype, white in ((12, "float32", 1.0), (4, "uint16", 65536), (2, "uint8", 256), (1, "float32", 1.0)):
        images = [(generator.random((h, w, channels)) * white).astype(dtype) for w, h in SIZES[:5]]
        preprocess = Preprocess(64, (0.4,) * channels, (0.2,) * channels)
        assert _difference(ImageTransform(preprocess, 32, 1.0, ImageForm(channels, dtype)), images) < 1e-3


def test_only_onnx_has_preprocessing(petune: Run, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("pets.pt2", "pets.safetensors"):
        refused = petune("export", "a", name, "--with-preprocessing")
        assert (refused.code, ".onnx" in refused.err, (tmp_path / name).exists()) == (2, True, False)


@pytest.mark.exhaustive
def test_a_file_and_its_preprocessing(petune: Run, tmp_path: Path) -> None:
    import onnx
    import onnxruntime
    from sklearn.datasets import load_sample_image

    adapter, _ = saved_run(tmp_path / "a", "adaptformer")
    done = petune("export", "a", "pets.onnx", "--with-preprocessing", "--json")
    assert done.code == 0, done.err
    output = json.loads(done.out)
    assert (output["difference"] < 1e-4, output["pixel_difference"] < 1e-3) == (True, True)
    session = onnxruntime.InferenceSession(tmp_path / "pets.onnx", providers=["CPUExecutionProvider"])
    assert [(i.name, i.type, i.shape) for i in session.get_inputs()] == [
        ("image", "tensor(uint8)", ["height", "width", 3])
    ]
    (info,) = [json.loads(p.value) for p in onnx.load(tmp_path / "pets.onnx").metadata_props if p.key == "petune"]
    assert (info["with_preprocessing"], info["activation"], info["classes"]) == (True, "softmax", list(CLASSES))
    photo = Image.fromarray(load_sample_image("china.jpg"))
    for name, size in (("cat.jpg", (640, 427)), ("odd.png", (301, 33)), ("small.png", (20, 31))):
        photo.resize(size).save(tmp_path / name)
        with Image.open(tmp_path / name) as image:
            logits = session.run(["logits"], {"image": np.asarray(image)})[0]
        (prediction,) = public.predict(adapter, tmp_path / name, top_k=3, device="cpu")
        probabilities = torch.from_numpy(logits).softmax(-1)[0].tolist()
        assert dict(prediction.top) == pytest.approx(dict(zip(CLASSES, probabilities, strict=True)), abs=1e-5)


@pytest.mark.exhaustive
def test_the_numbers_and_labels_of_a_file(tmp_path: Path) -> None:
    import onnxruntime

    adapter, _ = saved_run(tmp_path / "a", "linear")
    image = np.random.default_rng(0).integers(0, 256, (50, 41, 3), dtype=np.uint8)
    numbers = {"kind": "number", "names": ["age", "height", "width"]}
    state = {"mean": [2000.0, 1.5, -3.0], "std": [20.0, 0.5, 2.0]}
    labels = {"kind": "multi_hot", "names": list("abc")}
    tasks = (
        {"name": "regression", "options": {}, "state": state, "target": numbers},
        {"name": "multi_label", "options": {}, "state": {}, "target": labels},
    )
    for task in tasks:
        path = changed(adapter, tmp_path / str(task["name"]), task=task, classes=[])
        public.export(path, tmp_path / f"{task['name']}.onnx", with_preprocessing=True)
        session = onnxruntime.InferenceSession(tmp_path / f"{task['name']}.onnx", providers=["CPUExecutionProvider"])
        logits = torch.from_numpy(session.run(None, {"image": image})[0])
        predictor = public.Predictor(path, device="cpu")
        (prediction,) = predictor([image])
        expected = predictor.task.predict(logits)[0]
        shown = dict(prediction.top) if prediction.top else prediction.numbers
        assert shown == pytest.approx(expected, rel=1e-4)


def test_another_preprocessing_is_refused(tmp_path: Path) -> None:
    _, att = saved_run(tmp_path / "a", "linear")
    check = ImageCheck.of(att.model.eval(), ImageTransform(Preprocess(32, MEAN, STD), 37, 0.875))
    shifted = iter(check.pixels)
    assert check.pixel_difference(lambda image: next(shifted)) == 0
    shifted = iter(pixels + 0.05 for pixels in check.pixels)
    with pytest.raises(public.PetuneError, match="differs from petune's"):
        check.pixel_difference(lambda image: next(shifted))
