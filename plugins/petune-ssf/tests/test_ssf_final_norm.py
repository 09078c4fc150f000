"""SSF reaches the final norm, names the layers that it leaves out, and merges only into norms that it can."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import petune


def test_the_final_norm_is_scaled_where_it_shares_a_module_with_the_blocks():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 4 * 48}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8)
    att = petune.attach(transformers.ViTForImageClassification(config), "ssf")
    assert att.counts.tuned == 2 * 22 * 48 + 2 * 48


class OffsetNorm(nn.LayerNorm):
    """A LayerNorm that stores its weight less one, as VideoPrism's."""

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


def test_a_norm_that_adds_to_its_weight_is_not_merged():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=24, num_heads=2, num_classes=3)
    model.blocks[0].norm1 = OffsetNorm(24)
    model.eval()
    x = torch.randn(2, 3, 32, 32)
    attachment = petune.attach(model, "ssf", init_std=0.5)
    before = model(x)
    with pytest.raises(petune.NotMergeable) as caught:
        attachment.merge()
    assert not caught.value.changes_output  # nothing was folded
    assert torch.equal(model(x), before)


def test_layers_that_stay_as_they_are_are_named():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.VisionTransformer(16, 8, 1, 2, 24, 48, num_classes=3)
    with pytest.warns(UserWarning, match=r"ssf leaves 2 of 6 layers as they are: .*in_proj_weight, .*out_proj$"):
        petune.attach(model, "ssf")
