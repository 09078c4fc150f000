"""The labeled image datasets of torchvision as a table: where their files are, their splits and their targets.

A dataset is one line here, not a class. torchvision itself is imported only to read one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from petune.data.target import TargetKind

Args = Mapping[str, Any]
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
EMOTIONS = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")


@dataclass(frozen=True)
class Splits:
    """Arguments of torchvision's class for each split; a test split that is missing is cut from train.

    Attributes:
        folder: A folder in the root that this variant alone has; empty if all variants are in the same files.
    """

    train: Args = field(default_factory=dict)
    test: Args | None = None
    val: Args | None = None
    folder: str = ""


@dataclass(frozen=True)
class Labels:
    """Targets of a dataset.

    Attributes:
        names: The class names in order, or how to get them from torchvision's dataset.
        kind: Kind of the targets.
        value: Convert torchvision's target of an image to petune's.
        args: Arguments of torchvision's class that ask for these targets.
    """

    names: tuple[str, ...] | Callable[[Any], Sequence[Any]]
    kind: TargetKind = "class"
    value: Callable[[Any], Any] = int
    args: Args = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A dataset.

    Attributes:
        about: What it is, in a few words.
        file: A file or folder below data_dir, or a wildcard for it, that exists if the dataset is here.
        splits: By the name of a variant; the first is the default.
        labels: By the name of a kind of target; the first is the default.
        side: Side of all images in pixels, which are stored as they are; None for photos of different sizes.
        augment: The augmentation that suits the images.
        url: Where torchvision downloads it from; empty if it cannot.
        root: Subfolder of data_dir that torchvision calls the root, if it is not data_dir itself.
        needs: A package that torchvision needs to read it.
        upright: Turn torchvision's image upright.
    """

    about: str
    file: str
    splits: Mapping[str, Splits]
    labels: Mapping[str, Labels]
    side: int | None = None
    augment: str = "crop"
    url: str = ""
    root: str = ""
    needs: str = ""
    upright: Callable[[Any], Any] = lambda image: image


def _one(train: Args | None = None, test: Args | None = None, val: Args | None = None) -> dict[str, Splits]:
    return {"": Splits(train or {}, test, val)}


def _named(key: str, train: Any, test: Any = None, val: Any = None) -> dict[str, Splits]:
    test_args, val_args = (None if value is None else {key: value} for value in (test, val))
    return {"": Splits({key: train}, test_args, val_args)}


def _attribute(name: str, kind: TargetKind = "class", value: Callable[[Any], Any] = int, **args: Any) -> Labels:
    return Labels(lambda dataset: getattr(dataset, name), kind, value, args)


def _numbers(count: int, first: int = 0) -> dict[str, Labels]:
    names = tuple(str(first + i) for i in range(count))
    return {"": Labels(names, value=lambda target: int(target) - first)}


def _by_number(attribute: str) -> dict[str, Labels]:
    """Name the classes by a dict from name to number."""
    return {"": Labels(lambda dataset: sorted(getattr(dataset, attribute), key=getattr(dataset, attribute).get))}


def _from_one(target: int) -> int:
    return target - 1


def _mask(image: Any) -> Any:
    return np.asarray(image, np.uint8)


def _trimap(image: Any) -> Any:
    """Turn Oxford's 1 pet, 2 background, 3 border into 0, 1 and ignored; other values stay, and are refused."""
    table = np.arange(256, dtype=np.uint8)
    table[[0, 1, 2, 3]] = 255, 0, 1, 255
    values = np.asarray(image)
    unknown = values[values > 3]
    if unknown.size:
        raise ValueError(f"the mask holds {int(unknown.flat[0])}, which is no class. Oxford's are 1, 2 and 3")
    return table[values]


def _voc_objects(annotation: Any) -> Any:
    names = {item["name"] for item in annotation["annotation"]["object"] if item.get("difficult", "0") != "1"}
    return np.array([name in names for name in VOC_CLASSES], np.uint8)


def _city_names(dataset: Any) -> list[str]:
    return [c.name for c in sorted(dataset.classes, key=lambda c: c.train_id) if 0 <= c.train_id < 255]


def _city_mask(image: Any) -> Any:
    from torchvision.datasets import Cityscapes

    table = np.full(256, 255, np.uint8)
    for city in Cityscapes.classes:
        if city.id >= 0 and 0 <= city.train_id < 255:
            table[city.id] = city.train_id
    return table[np.asarray(image)]


def _imagenet_names(dataset: Any) -> list[str]:
    """Return the words of each class, with its WordNet id where two have the same: a crane is a bird or a machine."""
    names = [", ".join(words) for words in dataset.classes]
    return [
        f"{name} ({wnid})" if names.count(name) > 1 else name for name, wnid in zip(names, dataset.wnids, strict=True)
    ]


def _voc(*, with_test: bool) -> dict[str, Splits]:
    folders = {year: f"{'TrainVal/' * (year == '2011')}VOCdevkit/VOC{year}" for year in map(str, range(2007, 2013))}
    years = {
        year: Splits({"year": year, "image_set": "train"}, {"year": year, "image_set": "val"}, folder=folders[year])
        for year in ("2012", "2011", "2010", "2009", "2008")
    }
    train, val, test = ({"year": "2007", "image_set": part} for part in ("train", "val", "test"))
    seven = {"2007": Splits(train, test, val, folders["2007"])}
    return {**seven, **years} if with_test else {**years, **seven}


TRAIN = {"": Splits({"train": True}, {"train": False})}
CLASSES = {"": _attribute("classes")}
DIGITS = _numbers(10)
_DATASETS_HOST = "https://www.robots.ox.ac.uk/~vgg/data/"
_CLIP_HOST = "https://openaipublic.azureedge.net/clip/data/"
_GOOGLE = "https://drive.google.com"
_EMNIST = {
    name: Splits({"split": name, "train": True}, {"split": name, "train": False})
    for name in ("balanced", "byclass", "bymerge", "digits", "mnist")
}
_LETTERS = {"split": "letters", "target_transform": _from_one}  # torchvision names class 0 "N/A"
_EMNIST["letters"] = Splits({**_LETTERS, "train": True}, {**_LETTERS, "train": False})
_INATURALIST = {
    name: Splits({"version": f"2021_{name}"}, {"version": "2021_valid"}) for name in ("train_mini", "train")
}
_PLACES = {
    size: Splits({"split": "train-standard", "small": small}, {"split": "val", "small": small})
    for size, small in (("small", True), ("full", False))
}
_DTD = {
    str(number): Splits(
        {"split": "train", "partition": number},
        {"split": "test", "partition": number},
        {"split": "val", "partition": number},
    )
    for number in range(1, 11)
}
_OBJECTS = Labels(VOC_CLASSES, "multi_hot", _voc_objects)
_PETS = {
    "category": _attribute("classes", target_types="category"),
    "binary-category": _attribute("bin_classes", target_types="binary-category"),
    "segmentation": Labels(("pet", "background"), "mask", _trimap, {"target_types": "segmentation"}),
}
_AIRCRAFT = {level: _attribute("classes", annotation_level=level) for level in ("variant", "family", "manufacturer")}
_CLEVR = {
    "class": Labels(tuple(map(str, range(3, 11))), value=lambda count: count - 3),
    "number": Labels(("objects",), "number", lambda count: np.array([count], np.float64)),
}
_CELEBA = {
    "attr": Labels(
        lambda dataset: [name for name in dataset.attr_names if name],
        "multi_hot",
        lambda values: np.asarray(values, np.uint8),
        {"target_type": "attr"},
    )
}
_SEGMENTS = {"": Labels(("background", *VOC_CLASSES), "mask", _mask)}
_SBD = {"": Labels(("background", *VOC_CLASSES), "mask", _mask, {"mode": "segmentation"})}
_CITY = {"": Labels(_city_names, "mask", _city_mask, {"mode": "fine", "target_type": "semantic"})}
_CHARACTERS = {"": Labels(lambda dataset: [name for name in dataset.classes if name != "N/A"])}
_LSUN = {"": Labels(lambda dataset: [name.removesuffix("_train") for name in dataset.classes])}
_IMAGENETTE = {
    size: Splits({"split": "train", "size": size}, {"split": "val", "size": size})
    for size in ("full", "320px", "160px")
}
_IMAGENET = {"": Labels(_imagenet_names)}


def _upright_emnist(image: Any) -> Any:
    from PIL.Image import Transpose

    return image.transpose(Transpose.TRANSPOSE)  # EMNIST's files hold columns where MNIST's hold rows


TABLE: dict[str, Entry] = {
    "CIFAR10": Entry("60,000 images, 10 classes", "cifar-10-batches-py", TRAIN, CLASSES, 32, "light",
                     "https://www.cs.toronto.edu"),
    "CIFAR100": Entry("60,000 images, 100 classes", "cifar-100-python", TRAIN, CLASSES, 32, "light",
                      "https://www.cs.toronto.edu"),
    "Caltech101": Entry("8,677 photos, 101 classes", "caltech101/101_ObjectCategories", _one(),
                        {"": _attribute("categories", target_type="category")}, url=_GOOGLE),
    "Caltech256": Entry("30,607 photos, 257 classes", "caltech256/256_ObjectCategories", _one(),
                        {"": _attribute("categories")}, url=_GOOGLE),
    "CelebA": Entry("202,599 faces, 40 attributes", "celeba", _named("split", "train", "test", "valid"), _CELEBA,
                    url=_GOOGLE),
    "Cityscapes": Entry("3,475 street scenes with masks of 19 classes", "leftImg8bit",
                        _named("split", "train", "val"), _CITY, root="cityscapes"),
    "CLEVRClassification": Entry("85,000 rendered scenes, 3 to 10 objects", "clevr/CLEVR_v1.0",
                                 _named("split", "train", "val"), _CLEVR, url="https://dl.fbaipublicfiles.com"),
    "Country211": Entry("63,300 photos, 211 countries", "country211", _named("split", "train", "test", "valid"),
                        CLASSES, url=_CLIP_HOST),
    "DTD": Entry("5,640 textures, 47 classes, 10 partitions", "dtd/dtd", _DTD, CLASSES, url=_DATASETS_HOST),
    "EMNIST": Entry("814,255 letters and digits, six variants", "EMNIST/raw", _EMNIST, _CHARACTERS, 28,
                    "shift", "https://biometrics.nist.gov", upright=_upright_emnist),
    "EuroSAT": Entry("27,000 satellite images, 10 classes", "eurosat/2750", _one(), CLASSES, 64, "light",
                     "https://huggingface.co"),
    "FER2013": Entry("35,887 gray faces, 7 emotions", "fer2013", _named("split", "train", "test"),
                     {"": Labels(EMOTIONS)}, 48, "light"),
    "FGVCAircraft": Entry("10,000 aircraft, 100 variants", "fgvc-aircraft-2013b",
                          _named("split", "train", "test", "val"), _AIRCRAFT, url=_DATASETS_HOST),
    "FashionMNIST": Entry("70,000 gray clothes, 10 classes", "FashionMNIST/raw", TRAIN, CLASSES, 28, "light",
                          "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"),
    "Flowers102": Entry("8,189 flowers, 102 classes", "flowers-102/jpg", _named("split", "train", "test", "val"),
                        _numbers(102), url=_DATASETS_HOST, needs="scipy"),
    "Food101": Entry("101,000 dishes, 101 classes", "food-101/images", _named("split", "train", "test"), CLASSES,
                     url="http://data.vision.ee.ethz.ch"),
    "GTSRB": Entry("39,270 German traffic signs, 43 classes", "gtsrb/GTSRB", _named("split", "train", "test"),
                   _numbers(43), augment="shift", url="https://sid.erda.dk"),
    "INaturalist": Entry("plants and animals, 10,000 species", "2021_valid", _INATURALIST,
                         {"": _attribute("all_categories", target_type="full")},
                         url="https://ml-inat-competition-datasets.s3.amazonaws.com"),
    "ImageNet": Entry("1,281,167 photos, 1,000 classes", "val", _named("split", "train", "val"), _IMAGENET,
                      root="imagenet", needs="scipy"),
    "Imagenette": Entry("13,394 photos, 10 easy classes of ImageNet", "imagenette2*", _IMAGENETTE, _IMAGENET,
                        url="https://s3.amazonaws.com"),
    "KMNIST": Entry("70,000 Japanese characters, 10 classes", "KMNIST/raw", TRAIN, CLASSES, 28, "shift",
                    "http://codh.rois.ac.jp"),
    "LFWPeople": Entry("13,233 faces of 5,749 people", "lfw-py", _one({"split": "10fold"}), _by_number("class_to_idx")),
    "LSUN": Entry("10 million scenes, 10 classes", "bedroom_train_lmdb", _named("classes", "train", "val"), _LSUN,
                  root="lsun", needs="lmdb"),
    "MNIST": Entry("70,000 handwritten digits", "MNIST/raw", TRAIN, DIGITS, 28, "shift",
                   "https://ossci-datasets.s3.amazonaws.com"),
    "Omniglot": Entry("19,280 characters of 964 classes", "omniglot-py/images_background", _one({"background": True}),
                      {"": _attribute("_characters")}, augment="shift", url="https://raw.githubusercontent.com"),
    "OxfordIIITPet": Entry("7,349 cats and dogs, 37 breeds, masks", "oxford-iiit-pet/annotations",
                           _named("split", "trainval", "test"), _PETS, url=_DATASETS_HOST),
    "PCAM": Entry("327,680 tissue patches with or without tumor", "pcam", _named("split", "train", "test", "val"),
                  {"": Labels(("no tumor", "tumor"))}, 96, "light", _GOOGLE, needs="h5py"),
    "Places365": Entry("1,803,460 scenes, 365 classes", "categories_places365.txt", _PLACES, CLASSES,
                       url="http://data.csail.mit.edu"),
    "QMNIST": Entry("120,000 handwritten digits", "QMNIST/raw", TRAIN, DIGITS, 28, "shift",
                    "https://raw.githubusercontent.com"),
    "RenderedSST2": Entry("9,613 rendered film reviews, 2 classes", "rendered-sst2",
                          _named("split", "train", "test", "val"), CLASSES, augment="shift", url=_CLIP_HOST),
    "SBDataset": Entry("11,355 photos with masks of 20 classes", "cls", _named("image_set", "train", "val"), _SBD,
                       root="sbd", url="https://www2.eecs.berkeley.edu", needs="scipy"),
    "SEMEION": Entry("1,593 handwritten digits, 16x16", "semeion.data", _one(), DIGITS, 16, "shift",
                     "http://archive.ics.uci.edu"),
    "STL10": Entry("13,000 photos, 10 classes, 96x96", "stl10_binary", _named("split", "train", "test"), CLASSES, 96,
                   "light", "http://ai.stanford.edu"),
    "SUN397": Entry("108,754 scenes, 397 classes", "SUN397", _one(), CLASSES,
                    url="http://vision.princeton.edu"),
    "SVHN": Entry("99,289 house numbers, 32x32", "train_32x32.mat", _named("split", "train", "test"), DIGITS, 32,
                  "shift", "http://ufldl.stanford.edu", needs="scipy"),
    "StanfordCars": Entry("16,185 cars, 196 models", "stanford_cars", _named("split", "train", "test"), CLASSES,
                          needs="scipy"),
    "USPS": Entry("9,298 digits of envelopes, 16x16", "usps.bz2", TRAIN, DIGITS, 16, "shift",
                  "https://www.csie.ntu.edu.tw"),
    "VOCDetection": Entry("PASCAL VOC, the objects in a photo: 20 labels", "VOCdevkit", _voc(with_test=True),
                          {"": _OBJECTS}, url="http://host.robots.ox.ac.uk"),
    "VOCSegmentation": Entry("PASCAL VOC, masks of 20 classes", "VOCdevkit", _voc(with_test=False), _SEGMENTS,
                             url="http://host.robots.ox.ac.uk"),
}  # fmt: skip
"""Every labeled image dataset of torchvision."""

BOXES, CAPTIONS, PAIRS = "boxes", "captions", "pairs of images"
FLOW, STEREO, VIDEO, BASE = "optical flow", "stereo matching", "videos", "no dataset of its own"
NOT_LABELED: dict[str, str] = {
    "CarlaStereo": STEREO, "CocoCaptions": CAPTIONS, "CocoDetection": BOXES, "CREStereo": STEREO,
    "DatasetFolder": BASE, "ETH3DStereo": STEREO, "FakeData": "random pixels and labels",
    "FallingThingsStereo": STEREO, "Flickr30k": CAPTIONS, "Flickr8k": CAPTIONS, "FlyingChairs": FLOW,
    "FlyingThings3D": FLOW, "HD1K": FLOW, "HMDB51": VIDEO, "ImageFolder": "folder:PATH", "InStereo2k": STEREO,
    "Kinetics": VIDEO, "Kitti": BOXES, "Kitti2012Stereo": STEREO, "Kitti2015Stereo": STEREO, "KittiFlow": FLOW,
    "LFWPairs": PAIRS, "LSUNClass": "one class of LSUN", "Middlebury2014Stereo": STEREO, "MovingMNIST": VIDEO,
    "PhotoTour": PAIRS, "SBU": CAPTIONS, "SceneFlowStereo": STEREO, "Sintel": FLOW, "SintelStereo": STEREO,
    "UCF101": VIDEO, "VisionDataset": BASE, "WIDERFace": BOXES,
    "wrap_dataset_for_transforms_v2": BASE,
}  # fmt: skip
"""What else `torchvision.datasets.__all__` names, and why it is not in the table."""
