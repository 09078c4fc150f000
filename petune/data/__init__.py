"""Datasets: by name or from a folder, decoded once, augmented per batch."""

from petune.data.batches import Preprocess
from petune.data.dataset import Dataset, OnBroken, Split, Target
from petune.data.load import DATASETS, load_dataset

__all__ = ["DATASETS", "Dataset", "OnBroken", "Preprocess", "Split", "Target", "load_dataset"]
