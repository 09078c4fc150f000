"""Detectors whose heads share parameters or are trained by a loss of their own: what stays frozen is named."""

from __future__ import annotations

import warnings

import transformers

import petune


def d_fine() -> transformers.DFineForObjectDetection:
    backbone = transformers.HGNetV2Config(
        embedding_size=8,
        depths=[1, 1, 1, 1],
        hidden_sizes=[16, 16, 32, 32],
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 16, 16, 32],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[16, 16, 32, 32],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.DFineConfig(
        backbone_config=backbone,
        encoder_hidden_dim=32,
        encoder_in_channels=[16, 32, 32],
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        d_model=32,
        decoder_in_channels=[32, 32, 32],
        decoder_ffn_dim=32,
        decoder_attention_heads=2,
        decoder_layers=2,
        num_queries=8,
        num_denoising=0,
        hidden_expansion=0.5,
        num_labels=3,
        eval_size=None,
    )
    return transformers.DFineForObjectDetection(config).eval()


def test_every_frozen_layer_beside_the_heads_is_named_and_no_alias_of_a_head() -> None:
    model = d_fine()
    sites = petune.find_sites(model, (3, 64, 64))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        petune.attach(model, "linear", sites=sites)
    assert {"model.enc_score_head", "model.enc_bbox_head"} <= {path for path, _ in sites.head.named_modules}
    named = str(caught[0].message).partition("method trains them: ")[2].partition(". If")[0].split(", ")
    assert "model.decoder.pre_bbox_head" in named
    frozen = {id(p) for p in model.parameters() if not p.requires_grad}
    parameters = dict(model.named_parameters(remove_duplicate=False))  # of a module, or a parameter beside modules
    for path in named:
        assert any(id(p) in frozen for name, p in parameters.items() if f"{name}.".startswith(f"{path}.")), path
