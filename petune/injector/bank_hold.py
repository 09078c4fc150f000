"""The mark on a model that an AdapterBank holds it, so that nothing else is attached meanwhile."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from petune.base.errors import AttachError


class BankHold:
    """Tells whether the bank that holds a model still exists, and takes its adapters out if it does not.

    Args:
        bank: The bank, which is not kept alive; None for a copy of the model, which belongs to no bank.
        release: Takes all of its adapters out of the model; must not refer to the bank.
    """

    def __init__(self, bank: object = None, release: Callable[[], None] | None = None) -> None:
        self._bank = None if bank is None else weakref.ref(bank)
        self._release = release

    def give_way(self) -> None:
        """Take out the adapters of a bank that was deleted.

        Raises:
            AttachError: The bank still exists, or the model is a copy.
        """
        if self._bank is None or self._release is None:
            raise AttachError(
                "this model is a copy of one that an AdapterBank held, with the bank's adapters in it. Copy the model "
                "before the bank is made, or after bank.close()"
            )
        if self._bank() is not None:
            raise AttachError(
                "an AdapterBank holds this model. Load adapters with bank.load(name, path), or take all of them out "
                "with bank.close() first"
            )
        self._release()

    def __reduce__(self) -> tuple[type[BankHold], tuple[()]]:
        return BankHold, ()
