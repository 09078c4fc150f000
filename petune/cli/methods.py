"""`petune methods`: every registered tuner, the broken ones too. Nothing is imported to list them."""

from __future__ import annotations

from petune.cli.options import Json
from petune.cli.terminal import clean, show_json, show_table


def methods(json: Json = False) -> None:
    """List the installed methods, broken ones too."""
    from petune.registry import tuners

    found = [{"name": t.name, "distribution": t.distribution, "version": t.version, "state": t.state} for t in tuners()]
    if json:
        show_json(found)
        return
    columns = ("name", "distribution", "version", "state")
    show_table(columns, [[clean(str(t[c] or "-")) for c in columns] for t in found])
