"""Convpass meets petune's contract, on a tiny model of every library that is installed."""

import petune
from petune.plugin_dev.tiny_models import tiny_timm


def test_contract(petune_contract):
    petune_contract("convpass")


def test_prompts_enter_blocks_while_it_is_disabled():
    model = tiny_timm()
    petune.attach(model, "convpass").disable()
    assert petune.attach(model, "vpt", num_prompts=2, deep=False, name="prompts").tuned
