"""Prefix tuning meets petune's contract, on a tiny model of every library that is installed."""


def test_contract(petune_contract):
    petune_contract("prefix")
