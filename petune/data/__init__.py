"""Datasets by name or path, decoded once, augmented per batch."""

from petune.data.batches import Preprocess
from petune.data.dataset import Dataset, OnBroken, Split, Target
from petune.data.load import load_dataset

__all__ = ["Dataset", "OnBroken", "Preprocess", "Split", "Target", "load_dataset"]
