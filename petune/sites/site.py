"""Sites: the parts of a model that a tuner can edit, as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import nn

from petune.base.errors import SiteNotFound

Layout = Literal["BNC", "BHWC", "BCHW"]
"""The layout of the tensor at a site: B batch, N tokens, C (or D) channels, H and W rows and columns.

Videos may have a dimension of time before H.
"""

ROLES = ("attn", "mlp", "norm1", "norm2", "mid")
"""The sites inside a block, as named in `Block.parts` and by its properties."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Site:
    """A span of the forward, from the input of one module to the output of one (usually the same module).

    Attributes:
        role: `block`, `attn`, `mlp`, `norm1`, `norm2`, `mid`, `patch_embed`, `norm` or `head`.
        path: Dotted path of the module that is entered.
        enter: The module whose input enters the site.
        exit_path: Dotted path of the module that is left; equal to `path` for a site that is one module.
        exit: The module whose output leaves the site.
        dim: Width of the tokens.
        layout: Layout of the tensor.
        model: The model's class name, for messages.
        read_only: True for a tensor between modules (`mid`): an adapter can read it, but no module returns it.
        part: First channel, and the one after the last, of a site that is a part of what the module returns, such as q
            of a fused qkv; None for all.
        further: Of the role `head`, path and module of all heads but the first (`enter`) and the last (`exit`).
    """

    role: str
    path: str
    enter: nn.Module
    exit_path: str
    exit: nn.Module
    dim: int
    layout: Layout
    model: str
    read_only: bool = False
    part: tuple[int, int] | None = None
    further: tuple[tuple[str, nn.Module], ...] = ()

    @property
    def module(self) -> nn.Module:
        """The module that is entered; the whole site if `is_module`."""
        return self.enter

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules that bound the site: one, or two if enter and exit differ; of the role `head`, all heads."""
        return tuple(module for _, module in self.named_modules)

    @property
    def named_modules(self) -> tuple[tuple[str, nn.Module], ...]:
        """Path and module of each of `modules`."""
        first, last = (self.path, self.enter), (self.exit_path, self.exit)
        return (first,) if self.enter is self.exit else (first, *self.further, last)

    @property
    def is_module(self) -> bool:
        """True if the site is exactly one module's call."""
        return self.enter is self.exit and not self.read_only

    @property
    def where(self) -> str:
        """The site as text, for tables and messages."""
        if self.read_only:
            return f"input of {self.path}"
        if self.role == "head":
            return ", ".join(path for path, _ in self.named_modules)
        if self.part is not None:
            return f"{self.path}[{self.part[0]}:{self.part[1]}]"
        return self.path if self.is_module else f"{self.path} … {self.exit_path}"

    def __repr__(self) -> str:
        return f"<{self.role}: {self.where} ({self.layout}, dim {self.dim})>"


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Block(Site):
    """A transformer block: a site itself, with sites inside.

    `block.attn` and the other properties return the site, or raise SiteNotFound if this block does not have it.
    `block.parts` holds those that it has: `"mid" in block.parts`, `block.parts.get("norm1")`.

    Attributes:
        index: Position in the model, from 0 at the input.
        parts: The sites inside, by role; not those of a role that the block has several times.
        branches: All attentions and MLPs, in the order of the forward; see `sublayers`. A module that the block calls
            for several of them is listed once: an adapter there acts in each call.
        norms: The norms of `branches`, likewise.
        split_mlps: MLPs for other tokens than those of `branches`, such as one for text next to one for patches; they
            are no sites of this block.
        extra_inputs: Names of further tensors that the block is called with (rotary tables, masks).
        num_windows: Number of windows of one image that the attention is called with at once; 1 without windows.
        norm_first: True if no norm comes after its attention or MLP (pre-norm); a norm at the entrance of an attention
            is before it, too.
        changes_sum: True if the block returns something else than the sum of the stream and the MLP's output: its norm
            (post-norm), another function of it, such as an activation, or what a further MLP makes of it.
        scales_mlp: True if numbers multiply the MLP's output before it is added, as in LayerScale, and so all that an
            adapter adds to it.
        bias_modules: Modules inside that return a number for each pair of tokens (relative positions).
        own_modules: The modules that hold its weights: the block itself, or those of a block that is no module.
    """

    index: int
    parts: Mapping[str, Site] = field(default_factory=dict)
    branches: tuple[Site, ...] = ()
    norms: tuple[Site, ...] = ()
    split_mlps: tuple[Site, ...] = ()
    extra_inputs: tuple[str, ...] = ()
    num_windows: int = 1
    norm_first: bool = True
    changes_sum: bool = False
    scales_mlp: bool = False
    bias_modules: tuple[nn.Module, ...] = ()
    own_modules: tuple[nn.Module, ...] = ()

    def __post_init__(self) -> None:
        for name, roles in (("branches", ("attn", "mlp")), ("norms", ("norm1", "norm2"))):
            sites = getattr(self, name) or tuple(self.parts[role] for role in roles if role in self.parts)
            once = {(id(site.enter), id(site.exit)): site for site in reversed(sites)}
            object.__setattr__(self, name, tuple(site for site in sites if site in once.values()))

    @property
    def inner_sites(self) -> tuple[Site, ...]:
        """All sites inside, each once."""
        return tuple({id(site): site for site in (*self.parts.values(), *self.branches, *self.norms)}.values())

    @property
    def sublayers(self) -> tuple[Site, ...]:
        """All attentions and MLPs, in the order of the forward; two in most blocks, three in a decoder's.

        Raises:
            SiteNotFound: petune has found no attention, or no MLP.
        """
        roles = {site.role for site in self.branches}
        for role in ("attn", "mlp"):
            if role not in roles:
                self._part(role)
        return self.branches

    @property
    def attn(self) -> Site:
        """The attention, from its normalized input to its output before LayerScale and drop path."""
        return self._part("attn")

    @property
    def mlp(self) -> Site:
        """The MLP, from its normalized input to its output; enter and exit differ if it is several modules in a row."""
        return self._part("mlp")

    @property
    def norm1(self) -> Site:
        """The normalization of the attention."""
        return self._part("norm1")

    @property
    def norm2(self) -> Site:
        """The normalization of the MLP."""
        return self._part("norm2")

    @property
    def mid(self) -> Site:
        """The residual stream after the attention and before the MLP's norm."""
        return self._part("mid")

    def _part(self, role: str) -> Site:
        if role in self.parts:
            return self.parts[role]
        several = [site.where for site in self.branches if site.role == role]
        missing = f"{len(several)} sites {role!r} ({', '.join(several)}), not one" if several else f"no site {role!r}"
        if len(several) == 1:
            missing = f"no site {role!r} that is called once: it calls {several[0]} several times"
        if role == "mid" and "mlp" not in self.parts and all(site.role != "mlp" for site in self.branches):
            missing += (
                " (petune saw no MLP in it that is modules of its own: it may be fused with the attention, or experts)"
            )
        elif role == "mid":
            missing += (
                " (petune saw no module after the attention that reads a stream to which the MLP's output is added, or "
                "the block does not return that sum with its tokens in the same order"
            )
            missing += (
                ")" if self.is_module else "; the block is no module, and factors of its parent are not followed)"
            )
        before_mlp = self.parts.get("norm2") or self.parts.get("attn")
        keeps_width = before_mlp is None or "mlp" not in self.parts or before_mlp.dim == self.parts["mlp"].dim
        is_readable = role == "mid" and "mlp" in self.parts and keeps_width
        option = "variant=paddle_study" if self.scales_mlp else "input=norm"
        advice = f"adaptformer:{option}, which reads what enters the MLP, a method" if is_readable else "a method"
        raise SiteNotFound(
            f"block {self.index} ({self.path}) of {self.model} has {missing}; it has: "
            f"{', '.join(('block', *self.parts))}. Use {advice} that edits one of those, or linear, or full",
            role=role,
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Tower:
    """One of several rows of blocks that do not read each other, such as those of CLIP's image and text.

    Attributes:
        blocks: From input to output. Blocks that several towers share, such as the encoder of two decoders, are in
            each.
        norm: The final norm; None without one.
        further_norms: Other norms between blocks and heads; see `norms`.
    """

    blocks: tuple[Block, ...]
    norm: Site | None
    further_norms: tuple[Site, ...] = ()

    @property
    def norms(self) -> tuple[Site, ...]:
        """All norms of tokens between blocks and heads, which no block reads.

        Most towers have one. A model may have several in a row, one for its class token and another for its patches,
        or one after each block whose features a head reads.
        """
        return (*self.further_norms, *(() if self.norm is None else (self.norm,)))

    def within(self, where: str) -> Tower:
        """Return the tower without those of its norms that are not inside the module at the path `where`."""
        norm = self.norm if self.norm is not None and is_within(self.norm.path, where) else None
        further = tuple(other for other in self.further_norms if is_within(other.path, where))
        return replace(self, norm=norm, further_norms=further)


def is_within(path: str, parent: str) -> bool:
    """Return True if a module is the one at the path `parent`, or inside it."""
    return not parent or path == parent or path.startswith(f"{parent}.")


def modules_of(blocks: Iterable[Block]) -> set[nn.Module]:
    """Return the modules of blocks and of the sites inside, with all modules within them."""
    return modules_in(site for block in blocks for site in (block, *block.inner_sites))


def modules_with_place(blocks: Iterable[Block], head: Site | None) -> set[nn.Module]:
    """Return the modules of blocks and of the head; those of a block that is no module are its `own_modules`."""
    blocks = list(blocks)
    own = {m for block in blocks for module in block.own_modules for m in module.modules()}
    return modules_of(blocks) | own | modules_in([head] if head is not None else [])


def modules_in(sites: Iterable[Site]) -> set[nn.Module]:
    """Return the modules that bound some sites, with all modules within them."""
    return {m for site in sites for bound in site.modules for m in bound.modules()}
