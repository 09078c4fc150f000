"""`petune export`: each format computes what the model computes, without pickles; impossible exports are refused."""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import petune as public
from petune.backbones.create import create_backbone
from petune.base.errors import ExportError
from petune.serving.export.onnx_format import onnx_file
from petune.serving.export.torch_format import find_pickles, torch_file
from petune.serving.export.traced import OutputCheck
from petune.sites.input_spec import InputSpec
from tests.sampling import sampled
from tests.trained import CLASSES, card, changed, saved_run

Run = Callable[..., Any]
SPEC = InputSpec.of_size((3, 4, 4))
X = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))
SHAPE = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 1, "num_heads": 3}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


@pytest.mark.parametrize(
    ("method", "options", "merged"),
    sampled(
        [("adaptformer", {"bottleneck": 4}, False), ("vpt", {"num_prompts": 3}, False), ("lora", {"r": 2}, True),
         ("linear", {}, True), ("full", {}, True)],
        lambda row: row[0] in {"adaptformer", "lora"},
    ),
)  # fmt: skip
def test_a_torch_program(method: str, options: dict[str, object], merged: bool, tmp_path: Path) -> None:
    adapter, att = saved_run(tmp_path / "a", method, **options)
    expected = att.model.eval()(X)
    done = public.export(adapter, tmp_path / "out.pt2")
    assert (done.format, done.method, done.merged, bool(done.reason)) == ("torch", method, merged, not merged)
    assert done.difference < 1e-5
    assert done.bytes == (tmp_path / "out.pt2").stat().st_size
    extra = {"petune": ""}
    program = torch.export.load(tmp_path / "out.pt2", extra_files=extra).module()
    torch.testing.assert_close(program(X), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(program(X[:1]), expected[:1], atol=1e-5, rtol=1e-5)
    assert json.loads(extra["petune"])["classes"] == list(CLASSES)
    names = [key for key in program.state_dict() if "petune_" in key]
    assert bool(names) != merged
    assert not find_pickles((tmp_path / "out.pt2").read_bytes())


def test_the_documented_preprocessing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The example of docs/everyday-use.md gives the same logits as `petune.predict`."""
    monkeypatch.chdir(tmp_path)
    pixels = torch.randint(0, 256, (90, 60, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).resize((60, 45), Image.Resampling.BICUBIC).save("cat.jpg")
    adapter, _ = saved_run(tmp_path / "a", "linear")
    public.export(adapter, "pets.pt2")
    page = Path(__file__).parents[2] / "docs" / "everyday-use.md"
    examples = [code.partition("```")[0] for code in page.read_text(encoding="utf-8").split("```py\n")]
    names: dict[str, Any] = {}
    exec(next(code for code in examples if "pets.pt2" in code), names)
    info = names["info"]
    assert (info["stored_size"], info["crop"], info["interpolation"]) == (37, 0.875, "bicubic")
    (prediction,) = public.predict(adapter, "cat.jpg", top_k=3, device="cpu")
    probabilities = names["model"]((names["x"] - names["mean"]) / names["std"]).softmax(-1)[0].tolist()
    assert dict(prediction.top) == pytest.approx(dict(zip(info["classes"], probabilities, strict=True)), abs=1e-5)
    assert capsys.readouterr().out.strip() == prediction.top[0].name


@pytest.mark.exhaustive
def test_swin_with_prompts(tmp_path: Path) -> None:
    adapter, att = saved_run(tmp_path / "a", "vpt", "swin_tiny_patch4_window7_224", image_size=64)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    assert public.export(adapter, tmp_path / "out.pt2").merged is False
    program = torch.export.load(tmp_path / "out.pt2").module()
    torch.testing.assert_close(program(x), att.model.eval()(x), atol=1e-5, rtol=1e-5)


def test_onnx(petune: Run, tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    _, att = saved_run(tmp_path / "a", "adaptformer")
    done = petune("export", "a", "out.onnx", "--json")
    assert done.code == 0, done.err
    assert done.err == ""
    output = json.loads(done.out)
    assert (output["format"], output["merged"], output["difference"] < 1e-4) == ("onnx", False, True)
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape) for i in session.get_inputs()] == [("images", ["batch", 3, 32, 32])]
    assert [(o.name, o.shape) for o in session.get_outputs()] == [("logits", ["batch", 3])]
    for x in (X, X[:1]):
        logits = torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
        torch.testing.assert_close(logits, att.model.eval()(x), atol=1e-4, rtol=1e-4)
    props = {p.key: p.value for p in onnx.load(tmp_path / "out.onnx").metadata_props}
    assert json.loads(props["petune"])["mean"] == [0.5] * 3


PLAIN = ["lora", "bitfit", "ssf", "repadapter", "dora", "norm"]


@pytest.mark.parametrize("method", sampled(PLAIN, {"lora", "bitfit", "repadapter"}.__contains__))
def test_plain_weights(petune: Run, tmp_path: Path, method: str) -> None:
    _, att = saved_run(tmp_path / "a", method)
    expected = att.model.eval()(X)
    done = petune("export", "a", "plain.safetensors", "--format", "safetensors")
    assert done.code == 0, done.err
    assert "merged into the weights" in done.out
    plain = timm.create_model("vit_tiny_patch16_224", **SHAPE, num_classes=3).eval()
    plain.load_state_dict(load_file(tmp_path / "plain.safetensors"))
    torch.testing.assert_close(plain(X), expected, atol=1e-4, rtol=1e-4)
    with safe_open(tmp_path / "plain.safetensors", "pt") as opened:
        assert json.loads(opened.metadata()["petune"])["classes"] == list(CLASSES)


def test_plain_weights_can_start_another_run(petune: Run, tiny: tuple[str, ...], tmp_path: Path) -> None:
    saved_run(tmp_path / "a", "bitfit")
    assert petune("export", "a", "plain.safetensors").code == 0
    again = petune(
        "run", "--method", "linear", *tiny, "--weights=plain.safetensors", "--set=backbone_options.depth=1", "--dry-run"
    )
    assert again.code == 0, again.err


def test_weights_that_two_blocks_share_are_written_for_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tied_blocks.py").write_text(
        f"import timm\n\ndef build(num_classes):\n    options = {{**{SHAPE}, 'depth': 2, 'num_classes': num_classes}}\n"
        "    model = timm.create_model('vit_tiny_patch16_224', **options)\n"
        "    model.blocks[1].mlp = model.blocks[0].mlp\n    return model\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    made = create_backbone("tied_blocks:build", weights="none", num_classes=3)
    att = public.attach(made.model, "bitfit")
    att.save(tmp_path / "a", metadata=card(made, "tied_blocks:build", {}))
    public.export(tmp_path / "a", tmp_path / "plain.safetensors", trust_remote_code=True)
    written = load_file(tmp_path / "plain.safetensors")
    assert torch.equal(written["blocks.0.mlp.fc1.weight"], written["blocks.1.mlp.fc1.weight"])
    assert written.keys() == att.model.state_dict().keys()


@pytest.mark.exhaustive
def test_impossible_exports_are_refused(petune: Run, tmp_path: Path) -> None:
    saved_run(tmp_path / "a", "adaptformer")
    done = petune("export", "a", "plain.safetensors")
    assert (done.code, done.out) == (2, "")
    assert "ReLU" in done.err
    assert "--format" not in done.err  # it would contradict the name of the file
    for extension in (".pt2", ".onnx"):
        assert extension in done.err
        assert petune("export", "a", f"plain{extension}").code == 0
    assert not (tmp_path / "plain.safetensors").exists()
    for words in (("out.bin",), ("out.onnx", "--format", "torch"), ("out",)):
        wrong = petune("export", "a", *words)
        assert (wrong.code, "must end in" in wrong.err) == (2, True)
    (tmp_path / "old.pt2").write_bytes(b"")
    old = petune("export", "a", "old.pt2")
    assert (old.code, "already exists" in old.err) == (2, True)
    none = petune("export", "nowhere", "out.pt2")
    assert (none.code, "adapter directory" in none.err) == (4, True)


def test_an_adapter_without_a_recorded_backbone(petune: Run, tmp_path: Path) -> None:
    from petune.plugin_dev.tiny_models import tiny_timm

    public.attach(tiny_timm(), "bitfit").save(tmp_path / "a")
    done = petune("export", "a", "plain.safetensors")
    assert done.code == 4
    assert "does not record its backbone" in done.err


class Inconsistent(nn.Module):
    """Computes something else when traced, or branches on its input."""

    def __init__(self, trouble: str) -> None:
        super().__init__()
        self.linear, self.trouble = nn.Linear(3 * 4 * 4, 2), trouble

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.linear(x.flatten(1))
        if self.trouble == "branch" and bool(logits.sum() > 0):
            return -logits
        return logits.relu() if self.trouble == "traced" and torch.compiler.is_exporting() else logits


def test_a_file_that_computes_something_else_is_refused() -> None:
    torch.manual_seed(0)
    model = Inconsistent("traced")
    with pytest.raises(ExportError, match="differs from the model"):
        torch_file(model, OutputCheck.of(model, SPEC), "{}")
    branching = Inconsistent("branch")
    with pytest.raises(ExportError, match="cannot trace the model"):
        torch_file(branching, OutputCheck.of(branching, SPEC), "{}")


def test_pickles_are_found(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    torch.export.save(torch.export.export(model, (torch.ones(2, 3),)), tmp_path / "p.pt2")
    pickles = find_pickles((tmp_path / "p.pt2").read_bytes())
    assert pickles == [next(n for n in zipfile.ZipFile(tmp_path / "p.pt2").namelist() if "sample_inputs" in n)]


@pytest.mark.exhaustive
def test_a_model_that_onnxruntime_cannot_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import onnxruntime

    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : no kernel\nand more")

    adapter, _ = saved_run(tmp_path / "a", "linear")
    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(ExportError, match=r"cannot run this model: .* no kernel.*\.pt2"):
        public.export(adapter, tmp_path / "out.onnx")


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    saved_run(tmp_path / "a", "linear")
    public.export("~/a", "~/out.pt2")
    assert (tmp_path / "out.pt2").is_file()


def test_without_onnx_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(public.PetuneError, match=r"petune\[onnx\]"):
        onnx_file(nn.Linear(1, 1), OutputCheck.of(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), SPEC), "{}")


@pytest.mark.exhaustive
def test_every_task_names_its_activation(tmp_path: Path) -> None:
    """The numbers of a plain ONNX runtime are those of `petune.predict`."""
    import onnx
    import onnxruntime

    adapter, att = saved_run(tmp_path / "a", "linear")
    names = ["age", "height", "width"]
    target = {"kind": "number", "names": names}
    state = {"mean": [2000.0, 1.5, -3.0], "std": [20.0, 0.5, 2.0]}
    record = {"name": "regression", "options": {}, "state": state, "target": target}
    numbers = changed(adapter, tmp_path / "numbers", task=record, classes=[])
    public.export(numbers, tmp_path / "numbers.onnx")
    proto = onnx.load(tmp_path / "numbers.onnx")
    info = json.loads({prop.key: prop.value for prop in proto.metadata_props}["petune"])
    assert (info["activation"], info["task"]["target"]["names"]) == ("output * std + mean", names)
    session = onnxruntime.InferenceSession(tmp_path / "numbers.onnx", providers=["CPUExecutionProvider"])
    outputs = session.run(None, {"images": X.numpy()})[0]
    expected = public.Predictor(numbers, device="cpu").task.predict(att.model.eval()(X).detach())
    for row, wanted in zip(outputs, expected, strict=True):
        mean, std = info["task"]["state"]["mean"], info["task"]["state"]["std"]
        got = {n: float(o) * s + m for n, o, s, m in zip(names, row, std, mean, strict=True)}
        assert got == pytest.approx(wanted, rel=1e-4)
    labels = {"name": "multi_label", "options": {}, "state": {}, "target": {"kind": "multi_hot", "names": list("abc")}}
    public.export(changed(adapter, tmp_path / "labels", task=labels), tmp_path / "labels.safetensors")
    public.export(adapter, tmp_path / "classes.safetensors")
    for name, activation in (("labels", "sigmoid"), ("classes", "softmax")):
        with safe_open(tmp_path / f"{name}.safetensors", "pt") as opened:
            assert json.loads(opened.metadata()["petune"])["activation"] == activation
