"""LoRA adapters as changes of weights: the products s·B·A, their sums, and factors of them again by an SVD.

The average of several A and of several B is not the average of the changes B·A. Products are computed in float64.

Legend: O outputs, I inputs, R rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from petune.base.errors import UsageError

A, B = ".lora_A.weight", ".lora_B.weight"
RANK_OPTIONS = frozenset({"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"})
"""Options of LoRA that set rank and scale of its layers: adapters that differ in these have products of one shape."""
LAYER_OPTIONS = frozenset({"targets", "target_modules"})
NEGLIGIBLE = 1e-8
"""Singular values below this share of the largest are rounding."""


@dataclass(frozen=True)
class Factors:
    """The change B·A of one weight, float64.

    Attributes:
        b_OR, a_RI: Its factors, with the scale in B.
    """

    b_OR: Tensor
    a_RI: Tensor

    def product(self) -> Tensor:
        """Return the change, (O, I)."""
        return self.b_OR @ self.a_RI


def has_lora_options(config: Mapping[str, Any]) -> bool:
    """Return True if an adapter is a LoRA without variants, as far as its options tell."""
    options = config["config"]
    return options.get("type") == "lora" and not any(
        key.startswith("use_") and key != "use_rslora" and options[key] for key in options
    )


def is_plain_lora(config: Mapping[str, Any], tuned: Mapping[str, Tensor]) -> bool:
    """Return True if all that an adapter tunes are matrices A and B of PEFT's LoRA.

    Args:
        config: petune's configuration of the adapter.
        tuned: Its tuned tensors, by the file's keys.
    """
    others = [key for key, t in tuned.items() if not key.endswith((A, B)) or t.ndim != 2]
    return has_lora_options(config) and bool(tuned) and not others


def lora_factors(config: Mapping[str, Any], tuned: Mapping[str, Tensor]) -> dict[str, Factors]:
    """Return the change of each layer, by the file's key without its end.

    Args:
        config, tuned: See `is_plain_lora`.
    """
    layers = [key.removesuffix(A) for key in tuned if key.endswith(A)]
    return {
        layer: Factors(_scale(config["config"], layer) * tuned[layer + B].double().cpu(),
                       tuned[layer + A].double().cpu())
        for layer in layers
    }  # fmt: skip


def sum_of_factors(changes: Sequence[Mapping[str, Factors]], coefficients: Sequence[float]) -> dict[str, Factors]:
    """Return Σ_i c_i B_i A_i exactly, as factors of the sum of the ranks."""
    return {
        layer: Factors(
            torch.cat([c * change[layer].b_OR for c, change in zip(coefficients, changes, strict=True)], 1),
            torch.cat([change[layer].a_RI for change in changes]),
        )
        for layer in changes[0]
    }


def factored(
    changes: Mapping[str, Factors | Tensor], rank: int | None = None
) -> tuple[dict[str, Factors], dict[str, float]]:
    """Return the nearest factors of one rank, by an SVD of each change, and what they leave out.

    Args:
        changes: By layer: factors, or the change itself (O, I).
        rank: R; None takes the smallest one that leaves nothing out. A layer of a lower rank is filled up with zeros.

    Returns:
        Factors, and for each layer the Frobenius norm of what is left out relative to that of the change.

    Raises:
        UsageError: R is above that of any matrix of these shapes.
    """
    highest = max(min(_shape(change)) for change in changes.values())
    if rank is not None and rank > highest:
        raise UsageError(
            f"rank is {rank:,}, but no change of these layers has a rank above {highest:,}. Leave it out for the exact "
            "one",
            cli_hint="The flag is --rank",
        )
    decomposed = {layer: _svd(change) for layer, change in changes.items()}
    if rank is None:
        rank = max(1, *(int((s > NEGLIGIBLE * s.max()).sum()) for _, s, _ in decomposed.values()))
    errors = {layer: _left_out(s, rank) for layer, (_, s, _) in decomposed.items()}
    return {layer: _of_rank(*parts, rank) for layer, parts in decomposed.items()}, errors


def layers_in_parts(config: Mapping[str, Any], tuned: Mapping[str, Tensor]) -> list[str]:
    """Return the paths of all layers if q, k or v of some are changed alone, each by its own columns of B; else none.

    A combination has no such columns: it is a LoRA of the whole layers, see `with_rank`.

    Args:
        config, tuned: See `is_plain_lora`.
    """
    ranks = {key.removesuffix(A): len(t) for key, t in tuned.items() if key.endswith(A)}
    has_parts = any(rank != _rank(config["config"], layer) for layer, rank in ranks.items())
    return [_path(layer) for layer in ranks] if has_parts else []


def with_rank(options: Mapping[str, Any], rank: int, layers: Sequence[str] = ()) -> dict[str, Any]:
    """Return the options of a LoRA of another rank whose scale α/r is 1 in every layer.

    Args:
        options: Those of an adapter.
        rank: R.
        layers: See `layers_in_parts`; without them it has the layers of the options.
    """
    replaced = RANK_OPTIONS | (LAYER_OPTIONS if layers else frozenset())
    kept = {key: value for key, value in options.items() if key not in replaced}
    named = {"target_modules": list(layers)} if layers else {}
    return {**kept, **named, "r": rank, "lora_alpha": rank}


def lora_tensors(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Return tensors by the file's keys, for a scale of 1."""
    named = {layer + A: f.a_RI for layer, f in factors.items()} | {layer + B: f.b_OR for layer, f in factors.items()}
    return {key: tensor.float() for key, tensor in named.items()}


def _scale(options: Mapping[str, Any], layer: str) -> float:
    """Return α/r of a layer, or α/√r with `use_rslora`."""
    alpha, rank = float(_option(options, "lora_alpha", "alpha_pattern", layer)), _rank(options, layer)
    return alpha / (math.sqrt(rank) if options.get("use_rslora") else rank)


def _rank(options: Mapping[str, Any], layer: str) -> int:
    """Return the rank that the options give a layer; q and v in one layer have as many columns each."""
    return int(_option(options, "r", "rank_pattern", layer))


def _option(options: Mapping[str, Any], key: str, pattern_key: str, layer: str) -> Any:
    """Return an option of a layer; patterns match the ends of paths, as PEFT's do."""
    patterns = options.get(pattern_key) or {}
    matching = [value for name, value in patterns.items() if re.match(rf"(.*\.)?({name})$", _path(layer))]
    return matching[0] if matching else options.get(key, 8)


def _path(layer: str) -> str:
    return layer.removeprefix("base_model.model.")


def _svd(change: Factors | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (O, K), S (K,) and V^T (K, I); of factors without computing their product."""
    if isinstance(change, Tensor):
        u, s, vt = torch.linalg.svd(change.double(), full_matrices=False)
        return u, s, vt
    left, left_r = torch.linalg.qr(change.b_OR)
    right, right_r = torch.linalg.qr(change.a_RI.T)
    u, s, vt = torch.linalg.svd(left_r @ right_r.T, full_matrices=False)
    return left @ u, s, vt @ right.T


def _shape(change: Factors | Tensor) -> tuple[int, int]:
    """Return (O, I)."""
    if isinstance(change, Tensor):
        return change.shape[0], change.shape[1]
    return len(change.b_OR), change.a_RI.shape[1]


def _left_out(s_K: Tensor, rank: int) -> float:
    total = float(s_K.norm())
    return float(s_K[rank:].norm()) / total if total else 0.0


def _of_rank(u_OK: Tensor, s_K: Tensor, vt_KI: Tensor, rank: int) -> Factors:
    """Return the largest `rank` singular values as factors, the root of each in both."""
    root = s_K[:rank].sqrt()
    b_OR, a_RI = u_OK[:, :rank] * root, root[:, None] * vt_KI[:rank]
    missing = rank - len(root)
    if missing > 0:
        b_OR = torch.cat([b_OR, b_OR.new_zeros(len(b_OR), missing)], 1)
        a_RI = torch.cat([a_RI, a_RI.new_zeros(missing, a_RI.shape[1])])
    return Factors(b_OR, a_RI)


def check_rank(rank: int | None) -> None:
    """Check the rank that a user asks for.

    Raises:
        UsageError: It is below 1.
    """
    if rank is not None and rank < 1:
        raise UsageError(
            f"rank is {rank}. Use at least 1, or leave it out for the exact one", cli_hint="The flag is --rank"
        )
