"""Backbones: a name becomes a model with its weights."""
