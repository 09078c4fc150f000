"""Heads that a model or its library names, new weights, and layers outside of the heads that stay frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import petune
from petune.backbones.head import set_head
from tests.sites.whole_models import eomt, yolos


class Answering(nn.Module):
    """A ViT whose `get_classifier` returns `answer`."""

    img_size = 32

    def __init__(self, heads: nn.Module, answer: Any = None) -> None:
        super().__init__()
        size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
        self.body = timm.models.vision_transformer.VisionTransformer(**size, num_classes=0)
        self.heads = heads
        self.answer = answer

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)
        return sum((head(features) for head in self.heads.children()), torch.zeros(()))

    def get_classifier(self) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return {"list": self.heads, "tuple": tuple(self.heads.children())}.get(self.answer, self.heads)


def test_three_heads_are_saved_and_loaded(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return Answering(nn.ModuleList([nn.Linear(24, 4) for _ in range(3)]))

    model = build()
    att = petune.attach(model, "linear")
    for p in att.head.values():
        nn.init.normal_(p)
    att.save(tmp_path / "adapter")
    other = build()
    petune.load(other, tmp_path / "adapter")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(x), other.eval()(x))


@pytest.mark.parametrize("answer", ["list", "tuple"])
@pytest.mark.parametrize("as_dict", [False, True])
def test_get_classifier_of_three_heads_trains_three(answer: str, as_dict: bool) -> None:
    layers = [nn.Linear(24, 4) for _ in range(3)]
    heads = nn.ModuleDict(dict(zip("abc", layers, strict=True))) if as_dict else nn.ModuleList(layers)
    att = petune.attach(Answering(heads, answer), "linear")
    assert len(att.head) == 6


@pytest.mark.parametrize("answer", [None, NotImplementedError("no classifier is named")])
def test_a_second_classifier_over_all_tokens_trains_with_the_first(answer: Exception | None) -> None:
    """VOLO adds the maximum over its tokens of a classifier that `get_classifier` leaves out."""

    class WithAuxiliary(Answering):
        def __init__(self) -> None:
            super().__init__(nn.Linear(24, 4), answer)
            self.aux = nn.Linear(24, 4)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.body.forward_features(x)
            return self.heads(tokens[:, 0]) + 0.5 * self.aux(tokens[:, 1:]).amax(1)  # type: ignore[no-any-return]

    model = WithAuxiliary()
    assert {*petune.attach(model, "linear").head} == {"heads.weight", "heads.bias", "aux.weight", "aux.bias"}
    if answer is None:
        set_head(model, 6, seed=1)
        assert model.aux.out_features == 6
        assert torch.equal(model.aux.weight, model.heads.weight)


def test_blocks_inside_of_the_head_are_named_where_a_method_finds_none() -> None:
    """The text recognizers of PP-OCR have all their attention in the head."""
    model = Answering(nn.ModuleList([nn.Linear(24, 4)]))
    model.get_classifier = lambda: model.body  # type: ignore[method-assign]
    with pytest.raises(petune.SiteNotFound, match="inside of its head"):
        petune.attach(model, "adaptformer")
    assert len(petune.find_sites(model, head="heads.0").blocks) == 2


def test_a_get_classifier_that_raises_names_nothing() -> None:
    model = Answering(nn.ModuleList([nn.Linear(24, 4)]), NotImplementedError("override this"))
    assert petune.find_sites(model).head.path == "heads.0"


def test_features_of_tokens_are_not_logits() -> None:
    """Qwen2-VL's vision tower returns (tokens, width) for all images together."""
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    class Tower(nn.Module):
        image_size = 32

        def __init__(self) -> None:
            super().__init__()
            config = Qwen2VLVisionConfig(depth=2, embed_dim=16, hidden_size=16, num_heads=2, patch_size=8, mlp_ratio=2)
            self.tower = Qwen2VisionTransformerPretrainedModel(config)

        def forward(self, x: Tensor) -> Any:
            patches = x.reshape(len(x), 3, 4, 8, 4, 8).permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, 1, 8, 8)
            flat = patches.expand(-1, -1, 2, -1, -1).reshape(len(patches), -1)
            return self.tower(flat, torch.tensor([[1, 4, 4]] * len(x)))

    assert "head" not in petune.find_sites(Tower().eval()).parts


def loaded_without(model: nn.Module, part: str, path: Path) -> Any:
    """Return the model as `from_pretrained` loads it from a checkpoint that lacks a part."""
    state = {key: t for key, t in model.state_dict().items() if part not in key}
    model.save_pretrained(path, state_dict=state)  # type: ignore[operator]
    return type(model).from_pretrained(path)  # type: ignore[attr-defined]


def test_a_module_that_the_checkpoint_lacks_trains_as_a_head(tmp_path: Path) -> None:
    """The queries of an EoMT model that starts from a ViT are random; they are in a module of their own."""
    model = loaded_without(eomt(), "query", tmp_path / "model")
    att = petune.attach(model, "linear", input_size=(3, 32, 32))
    assert "query.weight" in att.head
    with torch.no_grad():
        att.head["query.weight"].fill_(0.5)
    att.save(tmp_path / "adapter")
    fresh = loaded_without(eomt(), "query", tmp_path / "other")
    fresh.load_state_dict({key: t for key, t in model.state_dict().items() if "query" not in key}, strict=False)
    assert petune.load(fresh, tmp_path / "adapter").head["query.weight"].eq(0.5).all()


def test_new_weights_inside_a_trained_module_are_refused_or_named(tmp_path: Path) -> None:
    """The detection tokens of a YOLOS model that starts from a ViT are in its base model, and random."""
    loaded = loaded_without(yolos(), "detection_tokens", tmp_path)
    with pytest.raises(petune.AttachError, match=r"detection_tokens.*vit\.embeddings"):
        petune.attach(loaded, "linear", input_size=(3, 32, 32))
    heads = ["class_labels_classifier", "bbox_predictor"]
    with pytest.warns(UserWarning, match="detection_tokens"):
        petune.attach(loaded, "linear", input_size=(3, 32, 32), head=heads).detach()
    att = petune.attach(loaded, "linear", input_size=(3, 32, 32), head=[*heads, "vit.embeddings"])
    assert "vit.embeddings.detection_tokens" in att.head


class Frozen(nn.Module):
    """Features of a small ViT, and after them, next to a classifier `h`, what a kind of model has there."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        layer = {"d_model": 8, "nhead": 2, "dim_feedforward": 16, "batch_first": True, "norm_first": True}
        self.stem, self.blocks = (
            nn.Conv2d(3, 8, 8, 8),
            nn.Sequential(*(nn.TransformerEncoderLayer(**layer) for _ in "ab")),
        )
        self.norm, self.h, self.kind = nn.LayerNorm(8), nn.Linear(8, 3), kind
        if kind == "pool":
            self.q, self.attn = nn.Parameter(torch.ones(1, 1, 8)), nn.MultiheadAttention(8, 2, batch_first=True)
        elif kind == "scale":
            self.t = nn.Parameter(torch.ones(1))
        elif kind != "plain":
            self.layer = {"rnn": nn.GRU(8, 8, batch_first=True), "bn": nn.BatchNorm1d(8), "exit": nn.Linear(8, 3)}[kind]

    def forward(self, x_BCHW: Tensor) -> Any:
        x_BND = self.stem(x_BCHW).flatten(2).mT
        y_BND = self.norm(self.blocks(x_BND))
        if self.kind == "pool":
            return self.h(self.attn(self.q.expand(len(y_BND), -1, -1), y_BND, y_BND)[0][:, 0])
        if self.kind == "rnn":
            return self.h(self.layer(y_BND)[0][:, -1])
        if self.kind == "scale":
            return self.t * self.h(y_BND.mean(1))
        if self.kind == "bn":
            return self.h(self.layer(y_BND.mean(1)))
        logits = self.h(y_BND.mean(1))
        return [logits, self.layer(self.blocks[0](x_BND).mean(1))] if self.kind == "exit" and self.training else logits


def test_what_acts_after_the_blocks_in_no_head_is_named() -> None:
    size = (3, 32, 32)
    named = {"pool": "q, attn", "rnn": "layer", "bn": "layer", "scale": "t", "exit": "layer"}
    for kind, names in named.items():
        with pytest.warns(UserWarning, match=f"stay frozen unless the method trains them: {names}. If") as warned:
            petune.attach(Frozen(kind), "bitfit", input_size=size)
        assert len(warned) == 1
    petune.attach(Frozen("plain"), "bitfit", input_size=size)
    with pytest.raises(petune.AttachError, match="parameter"):
        petune.find_sites(Frozen("scale"), size, head="t")
    with pytest.raises(petune.UsageError):
        petune.find_sites(Frozen("plain"), size).only(3)  # type: ignore[arg-type]


def test_a_predictor_that_get_classifier_forgets_is_named() -> None:
    class Boxes(Frozen):
        named = ("h", "more")

        def get_classifier(self) -> Any:
            named = tuple(getattr(self, name) for name in self.named)
            return named if len(named) > 1 else named[0]

        def forward(self, x_BCHW: Tensor) -> Any:
            y_BND = self.norm(self.blocks(self.stem(x_BCHW).flatten(2).mT))
            return self.h(y_BND[:, 0]), self.more(y_BND[:, 1]), self.box(y_BND[:, 2])

    class Tokens(Boxes):
        def forward(self, x_BCHW: Tensor) -> Any:
            y_BND = self.norm(self.blocks(self.stem(x_BCHW).flatten(2).mT))
            return {"logits": self.h(y_BND), "more": self.more(y_BND), "boxes": self.box(y_BND)}

    for kind, named in ((Boxes, ("h", "more")), (Boxes, ("h",)), (Tokens, ("h",))):
        model = kind("plain")
        model.named, model.more, model.box = named, nn.Linear(8, 3), nn.Linear(8, 4)
        with pytest.warns(UserWarning, match="stay frozen .* box"):
            petune.attach(model, "bitfit", input_size=(3, 32, 32))
