"""Check a dataset before training."""

from petune.data.check.checker import check_dataset
from petune.data.check.report import DataReport, NearDuplicates, NearPair

__all__ = ["DataReport", "NearDuplicates", "NearPair", "check_dataset"]
