"""Sort all models of transformers that take pixels: those with a row, and why the others have none.

It reads the installed source, and builds nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import transformers

from survey.models import BY_CLASS
from survey.other_library_models import TRANSFORMERS
from survey.transformers_classes import find_class

MODELS = Path(transformers.__file__).parent / "models"
TAKES_PIXELS = re.compile("pixel_values|flattened_patches")
COMPOSES = re.compile(r"Auto(Model\w*|Backbone)\.from_config|load_backbone|\.from_backbone_config|build_backbone")
OF_OTHERS = re.compile("Text|Audio|Output|Decoder|Qformer|QFormer|GRU|Language|Vector")
"""Classes that do not look at pixels."""

_LANGUAGE = "the language model's attention, over tokens of words and images; the towers are other families"
_MEMORY = "segments a video with a memory of earlier frames; its encoder of images is another family"
_MATCHES = "matches points of two images"
WITHOUT_ROW = {
    **dict.fromkeys(("aria", "chameleon", "embedding_gemma2", "emu3", "gemma3", "idefics", "inkling"), _LANGUAGE),
    **dict.fromkeys(("inkling2_loop", "neomme", "qwen3_5_moe", "t5gemma2", "trocr", "unlimited_ocr"), _LANGUAGE),
    **dict.fromkeys(("edgetam_video", "sam2_video", "sam3_tracker_video"), _MEMORY),
    **dict.fromkeys(("efficientloftr", "lightglue", "superglue"), _MATCHES),
    "tvp": "takes one video at a time: its view of position embeddings fails for a batch",
    **dict.fromkeys(("musicgen", "musicgen_melody"), "makes music"),
}
"""Why models with an attention of their own have no row; those without a reason are still to be surveyed."""

Kinds = dict[str, dict[str, str]]
"""By kind and package, what there is to say."""


def packages_of(families: Iterable[str]) -> set[str]:
    """Return the packages of `transformers.models` with the models of these families."""
    configs = {family: config for family, (config, _) in TRANSFORMERS.items()}
    configs |= {family: entry.model for family, entry in BY_CLASS.items()}
    return {find_class(configs[family]).__module__.split(".")[2] for family in families if family in configs}


def sort_models(own: set[str]) -> Kinds:
    """Return packages of `transformers.models` by kind.

    Args:
        own: Those of the models with a row.

    Returns:
        `surveyed`; `same`, whose attention has the code of surveyed ones; `composed`, whose towers are built from a
        config; `none`, without attention; `other`.
    """
    texts = {path.name: _source(path) for path in sorted(MODELS.iterdir()) if path.is_dir()}
    texts = {name: text for name, text in texts.items() if TAKES_PIXELS.search(text)}
    twins = {code: name for name in own & texts.keys() for code in _attentions(texts[name]).values()}
    kinds: Kinds = {"surveyed": {}, "same": {}, "composed": {}, "none": {}, "other": {}}
    for name, text in texts.items():
        attentions = _attentions(text)
        others = [cls for cls, code in attentions.items() if code not in twins]
        if name in own:
            kinds["surveyed"][name] = ""
        elif attentions and not others:
            kinds["same"][name] = ", ".join(sorted({twins[code] for code in attentions.values()}))
        elif others:
            kinds["other"][name] = WITHOUT_ROW.get(name, "")
        else:
            kinds["composed" if COMPOSES.search(text) else "none"][name] = ""
    return kinds


def _source(package: Path) -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(package.glob("modeling_*.py")))


def _attentions(text: str) -> dict[str, str]:
    """Return the code of each attention that may look at pixels, without what its package calls itself."""
    pattern = r"^class (\w+)\b.*?(?=^(?:class |def |@|[A-Z_]+ ?=|__all__)|\Z)"
    classes = list(re.finditer(pattern, text, re.M | re.S))
    names = [match[1] for match in classes]
    prefixes = sorted((n.removesuffix("PreTrainedModel") for n in names if n.endswith("PreTrainedModel")), key=len)
    return {
        match[1]: _plain(match[0], prefixes[::-1])
        for match in classes
        if "Attention" in match[1] and not OF_OTHERS.search(match[1])
    }


def _plain(code: str, prefixes: list[str]) -> str:
    """Return code without docstrings, comments, annotations and names of the package."""
    code = re.sub(r'""".*?"""|#[^\n]*', "", code, flags=re.S)
    for prefix in filter(None, prefixes):
        code = code.replace(prefix, "")
    code = re.sub(r": [\w\.\[\], |]+(?= *[,=)\n])|->[^\n]*:\n|\w*Config\b|\bVision|\bViT", "", code)
    return re.sub(r"\s+", " ", code)
