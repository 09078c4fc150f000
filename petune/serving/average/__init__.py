"""Average adapters: soups, task arithmetic, TIES, DARE and WiSE-FT."""

from petune.serving.average.average_run import average_adapters
from petune.serving.average.record import Averaged, AveragedFrom
from petune.serving.average.request import AverageRequest

__all__ = ["AverageRequest", "Averaged", "AveragedFrom", "average_adapters"]
