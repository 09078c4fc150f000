"""Datasets by name or path, decoded once, augmented per batch."""

from petune.data.dataset import Dataset, OnBroken, Split, Target
from petune.data.load import load_dataset
from petune.data.preprocess import Preprocess

__all__ = ["Dataset", "OnBroken", "Preprocess", "Split", "Target", "load_dataset"]
