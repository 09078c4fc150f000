"""SSF meets petune's contract, on a tiny model of every library that is installed."""

import pytest


@pytest.mark.filterwarnings("ignore:VisionTransformer reads the weights")
def test_contract(petune_contract):
    petune_contract("ssf")
