"""Count the weight matrices that a call works with."""

from __future__ import annotations

from petune.sites.trace import Call, own_weights


def num_matrices(call: Call) -> int:
    """Count layers with a matrix or kernel, and matrices that a module owns directly (experts, an MLP by F.linear)."""
    return sum(max(1, _num_of_width(c)) if c.has_matrix else _num_bare(c) for c in call.subtree())


def _num_of_width(leaf: Call) -> int:
    """Count the matrices of a layer that map from or to tokens as wide as its input."""
    return sum(p.ndim == 2 and leaf.width in p.shape for p in own_weights(leaf.module))


def _num_bare(call: Call) -> int:
    bare = [] if call.is_leaf else own_weights(call.module)
    return sum(sum(side > 1 for side in p.shape) >= 2 for p in bare)


def num_weights(call: Call) -> int:
    return sum(p.numel() for p in call.module.parameters())
