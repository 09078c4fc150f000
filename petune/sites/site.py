"""The places of a model that a tuner can edit: plain data, printable as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from petune.base.errors import AttachError, SiteNotFound

Layout = Literal["BNC", "BHWC", "BCHW"]
"""How a site lays out its tensor: B batch, N tokens, C (or D) channels, H and W rows and columns."""

ROLES = ("attn", "mlp", "norm1", "norm2", "mid")


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Site:
    """A span of the forward, from what enters one module to what leaves one (usually the same one).

    Attributes:
        role: What the place is: `block`, `attn`, `mlp`, `norm1`, `norm2`, `mid`, `patch_embed`, `norm`, `head`.
        path: Dotted path of the module that is entered.
        enter: The module whose input enters the site.
        exit_path: Dotted path of the module that is left; equal to `path` for a site that is one module.
        exit: The module whose output leaves the site.
        dim: Width of the tokens there.
        layout: How the tensor is laid out there.
        point: True for a place between modules (`mid`): a tensor to read, not a module to change.
        model: The model's class name, for messages.
    """

    role: str
    path: str
    enter: nn.Module
    exit_path: str
    exit: nn.Module
    dim: int
    layout: Layout
    model: str
    point: bool = False

    @property
    def module(self) -> nn.Module:
        """The module that is entered; the whole site when `is_module`."""
        return self.enter

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules that bound the site: one, or two where enter and exit differ."""
        return (self.enter,) if self.enter is self.exit else (self.enter, self.exit)

    @property
    def is_module(self) -> bool:
        """Whether the site is exactly one module's call."""
        return self.enter is self.exit and not self.point

    @property
    def where(self) -> str:
        """The place in words, for tables and messages."""
        if self.point:
            return f"what enters {self.path}"
        return self.path if self.is_module else f"{self.path} … {self.exit_path}"

    def __repr__(self) -> str:
        return f"<{self.role}: {self.where} ({self.layout}, dim {self.dim})>"


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Block(Site):
    """A transformer block. It is a Site itself; its inner places are None where the model has none.

    Attributes:
        index: Its position, from 0 at the input.
        attn: The attention, from its normalised input to its output before LayerScale and drop path.
        mlp: The MLP, likewise; enter and exit differ where it is several sibling modules.
        norm1: The normalisation that belongs to the attention.
        norm2: The normalisation that belongs to the MLP.
        mid: The residual stream after attention and before the MLP's norm.
        takes_extra: Names of further tensors the block is called with (rotary tables, masks).
        num_windows: How many windows of one image the attention is called with at once; 1 without windows.
        norm_first: Whether norm1 comes before the attention.
        biases: Modules within the block that return a number for each pair of tokens (relative positions).
    """

    index: int
    attn: Site | None = None
    mlp: Site | None = None
    norm1: Site | None = None
    norm2: Site | None = None
    mid: Site | None = None
    takes_extra: tuple[str, ...] = ()
    num_windows: int = 1
    norm_first: bool = True
    biases: tuple[nn.Module, ...] = ()

    def need(self, role: str) -> Site:
        """The inner place `role`.

        Raises:
            SiteNotFound: This block has no such place; the message lists those it has.
        """
        site = getattr(self, role) if role in ROLES else None
        if isinstance(site, Site):
            return site
        have = ", ".join(r for r in ROLES if getattr(self, r) is not None) or "none"
        raise SiteNotFound(
            f"the method needs the place {role!r} in every block, but block {self.index} ({self.path}) of "
            f"{self.model} does not have it; its places are: block, {have}. Use a method that edits one of "
            "those, or linear, or full"
        )


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Sites:
    """All places of one model, as `find_sites` returns them; `print(sites)` shows a table.

    Attributes:
        model: The model's class name.
        input_size: (channels, height, width) of the image the model was traced with.
        patch_embed: From image to tokens; None where it was not found.
        blocks: The transformer blocks from input to output; empty for a model without attention.
        norm: The final normalisation.
        head: The classifier.
        beside_head: Paths of further layers that pooled features go through; they count as backbone.
        num_prefix_tokens: Tokens before the patches (CLS, registers, distillation).
        embed_dim: Width of the tokens in the last block, 0 without blocks.
        grid_size: Patches as (rows, columns) where the first block is entered; None if unknown.
    """

    model: str
    input_size: tuple[int, int, int]
    patch_embed: Site | None
    blocks: tuple[Block, ...]
    norm: Site | None
    head: Site | None
    num_prefix_tokens: int
    embed_dim: int
    grid_size: tuple[int, int] | None
    beside_head: tuple[str, ...] = ()

    def need_blocks(self) -> tuple[Block, ...]:
        """The blocks.

        Raises:
            SiteNotFound: The model has none.
        """
        if not self.blocks:
            raise SiteNotFound(
                f"the method edits transformer blocks, but {self.model} has no attention block that "
                "petune can see. Use linear or full, which need none"
            )
        return self.blocks

    def need_head(self) -> Site:
        """The classifier.

        Raises:
            SiteNotFound: The model has none.
        """
        if self.head is None:
            raise SiteNotFound(
                f"the method trains a classifier, but {self.model} has none. Build the model with the number "
                "of classes (timm: num_classes=N, or model.reset_classifier(N))"
            )
        return self.head

    @property
    def patch_size(self) -> tuple[int, int] | None:
        """Pixels (rows, columns) of a patch where the first block is entered; None if unknown."""
        if self.grid_size is None:
            return None
        return self.input_size[1] // self.grid_size[0], self.input_size[2] // self.grid_size[1]

    def __str__(self) -> str:
        grid = "?" if self.grid_size is None else f"{self.grid_size[0]}x{self.grid_size[1]}"
        title = (
            f"{self.model}: {len(self.blocks)} blocks, width {self.embed_dim}, grid {grid}, "
            f"{self.num_prefix_tokens} prefix tokens, input {'x'.join(map(str, self.input_size))}"
        )
        rows = [("site", "where", "layout", "dim")]
        for name, site in self._named():
            rows.append((name, "-", "-", "-") if site is None else (name, site.where, site.layout, str(site.dim)))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([title, *lines])

    __repr__ = __str__

    def _named(self) -> list[tuple[str, Site | None]]:
        rows: list[tuple[str, Site | None]] = [("patch_embed", self.patch_embed)]
        for block in self.blocks:
            rows.append((f"block {block.index}", block))
            rows += [(f"  {role}", getattr(block, role)) for role in ROLES]
        return [*rows, ("norm", self.norm), ("head", self.head)]


def present(sites: Sites, site: Site | None, verb: str) -> Site:
    """The site that a verb was given.

    Raises:
        SiteNotFound: The model does not have it.
    """
    if isinstance(site, Site):
        return site
    blocks = sites.need_blocks()
    have = ", ".join(role for role in ROLES if getattr(blocks[0], role) is not None)
    raise SiteNotFound(
        f"{verb} was given a place that {sites.model} does not have; its blocks have: block, "
        f"{have or 'no inner places'}. Ask for a place with block.need(name), or use another method"
    )


def changeable(sites: Sites, site: Site | None, verb: str) -> Site:
    """The same for a verb that changes something there.

    Raises:
        AttachError: It is a tensor between modules.
    """
    site = present(sites, site, verb)
    if site.point:
        raise AttachError(
            f"{verb} changes what a module returns or receives, but {site.role!r} ({site.where}) is a tensor "
            "between modules: it can only be read, as the first place of branch"
        )
    return site


def whole(site: Site, verb: str) -> Site:
    """The same for a verb that means all of a block.

    Raises:
        AttachError: The block is no module of its own: its modules do not hold what lies between them.
    """
    if isinstance(site, Block) and not site.is_module:
        raise AttachError(
            f"{verb} needs a block that is one module, but block {site.index} of {site.model} is the stretch "
            f"{site.where} of its forward: only its ends would change. Use a method that edits attention or MLP, "
            "or full"
        )
    return site
