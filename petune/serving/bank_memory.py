"""The values of adapters that are in memory; those that were not used for the longest time give way."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable

from petune.serving.bank_kind import AdapterValues


class ResidentValues:
    """Values of adapters, each under a key of its own, up to a number of bytes.

    Attributes:
        max_bytes: None for no limit. The values that were added last stay, even if they alone need more.
    """

    def __init__(self, max_bytes: int | None) -> None:
        self.max_bytes = max_bytes
        self._values: OrderedDict[Hashable, AdapterValues] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    @property
    def num_bytes(self) -> int:
        """Memory of all values."""
        return self._num_bytes

    def get(self, key: Hashable) -> AdapterValues | None:
        """Return the values of an adapter, and note that it was used; None if they are not in memory."""
        with self._lock:
            values = self._values.get(key)
            if values is not None:
                self._values.move_to_end(key)
            return values

    def add(self, key: Hashable, values: AdapterValues) -> None:
        """Keep the values of an adapter; others give way if there is no room."""
        with self._lock:
            self._discard(key)
            self._values[key] = values
            self._num_bytes += values.num_bytes
            while self.max_bytes is not None and self._num_bytes > self.max_bytes and len(self._values) > 1:
                self._discard(next(iter(self._values)))

    def discard(self, key: Hashable) -> None:
        """Forget the values of an adapter."""
        with self._lock:
            self._discard(key)

    def _discard(self, key: Hashable) -> None:
        values = self._values.pop(key, None)
        if values is not None:
            self._num_bytes -= values.num_bytes
