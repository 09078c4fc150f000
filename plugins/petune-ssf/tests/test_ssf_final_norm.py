"""SSF reaches the final norm."""

import pytest

import petune


def test_the_final_norm_is_scaled_where_it_shares_a_module_with_the_blocks():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 4 * 48}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8)
    att = petune.attach(transformers.ViTForImageClassification(config), "ssf")
    assert att.counts.tuned == 2 * 22 * 48 + 2 * 48
