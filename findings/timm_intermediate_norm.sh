#!/usr/bin/env bash
# timm 1.0.31: `norm=True` of get_intermediate_layers and forward_intermediates does nothing for a ViT with
# global_pool="avg". Such a model has its final norm behind the pooling (`fc_norm`), and the `norm` that both calls apply
# is an identity; neither says so. The same architecture with global_pool="token" gives normalized features. So dense
# features for segmentation or retrieval change their scale when only the pooling of the classifier changes, and code
# that compares backbones compares normalized features of one with raw ones of another.
# Expected output: "token: normalized, avg: the same as with norm=False" for each of the two calls
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 timm==1.0.31
cd "$dir"
"$dir/venv/bin/python" - <<'PY'
import timm
import torch


def intermediate(model: torch.nn.Module, norm: bool) -> torch.Tensor:
    return model.get_intermediate_layers(images, n=1, norm=norm)[0]


def forward(model: torch.nn.Module, norm: bool) -> torch.Tensor:
    return model.forward_intermediates(images, norm=norm, output_fmt="NLC", intermediates_only=True)[-1]


def described(features: torch.Tensor, raw: torch.Tensor) -> str:
    if torch.equal(features, raw):
        return "the same as with norm=False"
    assert (features.std(-1, correction=0) - 1).abs().max() < 0.01
    return "normalized"


torch.manual_seed(0)
images = torch.randn(2, 3, 224, 224)
with torch.no_grad():
    for call in (intermediate, forward):
        found = []
        for pool in ("token", "avg"):
            model = timm.create_model("vit_tiny_patch16_224", depth=2, global_pool=pool).eval()
            found.append(described(call(model, True), call(model, False)))
        print(f"{call.__name__}: token: {found[0]}, avg: {found[1]}")
        assert found == ["normalized", "the same as with norm=False"]
PY
