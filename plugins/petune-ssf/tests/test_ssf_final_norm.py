"""SSF reaches the final norm, and merges only into norms that it can."""

import pytest
import torch
from petune_ssf import ScaleShift
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
    adapter, x = ScaleShift(8, 0.1), torch.randn(2, 8)
    norm, plain = OffsetNorm(8), nn.LayerNorm(8)
    before = norm(x)
    with pytest.raises(petune.NotMergeable, match="OffsetNorm, which adds a constant"):
        adapter.merge(norm)
    assert torch.equal(norm(x), before)
    expected = adapter(plain(x))
    adapter.merge(plain)
    torch.testing.assert_close(plain(x), expected)
