"""Sites: the parts of a model that a tuner can edit, as plain data; `print(sites)` is a table of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import nn

from petune.base.block_choice import chosen_indices, path_of_tower
from petune.base.errors import SiteNotFound, UsageError
from petune.base.text import plural
from petune.sites.input_spec import InputSpec

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
        branches: All attentions and MLPs, in the order of the forward; see `sublayers`.
        norms: The norms of `branches`.
        extra_inputs: Names of further tensors that the block is called with (rotary tables, masks).
        num_windows: Number of windows of one image that the attention is called with at once; 1 without windows.
        norm_first: True if norm1 comes before the attention.
        normalizes_sum: True if the block ends with a norm of the sum of the stream and the MLP's output (post-norm).
        bias_modules: Modules inside that return a number for each pair of tokens (relative positions).
        own_modules: The modules that hold its weights: the block itself, or those of a block that is no module.
    """

    index: int
    parts: Mapping[str, Site] = field(default_factory=dict)
    branches: tuple[Site, ...] = ()
    norms: tuple[Site, ...] = ()
    extra_inputs: tuple[str, ...] = ()
    num_windows: int = 1
    norm_first: bool = True
    normalizes_sum: bool = False
    bias_modules: tuple[nn.Module, ...] = ()
    own_modules: tuple[nn.Module, ...] = ()

    def __post_init__(self) -> None:
        for name, roles in (("branches", ("attn", "mlp")), ("norms", ("norm1", "norm2"))):
            if not getattr(self, name):
                object.__setattr__(self, name, tuple(self.parts[role] for role in roles if role in self.parts))

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
        is_readable = role == "mid" and "mlp" in self.parts
        advice = "adaptformer:input=norm, which reads what enters the MLP, a method" if is_readable else "a method"
        raise SiteNotFound(
            f"block {self.index} ({self.path}) of {self.model} has {missing}; it has: "
            f"{', '.join(('block', *self.parts))}. Use {advice} that edits one of those, or linear, or full",
            role=role,
        )


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Sites:
    """All sites of one model, as `find_sites` returns them; `print(sites)` shows a table.

    `sites.head`, `sites.norm` and `sites.patch_embed` return the site, or raise SiteNotFound if the model does not have
    it. `sites.parts` holds those that it has: `"norm" in sites.parts`, `sites.parts.get("head")`.

    Attributes:
        model: The model's class name.
        input_spec: What the model takes, as it was traced.
        blocks: The transformer blocks from input to output; empty for a model without attention.
        parts: Patch embedding, final norm and classifier, by role.
        num_prefix_tokens: Number of tokens before the patches (CLS, registers, distillation).
        embed_dim: Width of the tokens in the last block, 0 without blocks.
        grid_size: Patches as (rows, columns) at the first block's input, of a video (time, rows, columns); None if
            unknown.
        beside_head: Paths of layers between backbone and heads (for pooled features, necks, decoders); they count as
            backbone.
        chosen_head: Paths of the heads that `find_sites` was given; None if it found the heads itself.
        all_blocks: The model's blocks, also those that were left out by `only` or `dataclasses.replace(sites,
            blocks=…)`.
        within: The path that `only` was given; empty for the whole model.
        chosen_from: The sites of which a method's option `blocks` has chosen some; None if it is `all`.
        why_no_blocks: What was seen of attention in a model without blocks.
    """

    model: str
    input_spec: InputSpec
    blocks: tuple[Block, ...]
    parts: Mapping[str, Site]
    num_prefix_tokens: int
    embed_dim: int
    grid_size: tuple[int, ...] | None
    beside_head: tuple[str, ...] = ()
    chosen_head: tuple[str, ...] | None = None
    all_blocks: tuple[Block, ...] = ()
    within: str = ""
    chosen_from: Sites | None = None
    why_no_blocks: str = ""

    def __post_init__(self) -> None:
        if not self.all_blocks:
            object.__setattr__(self, "all_blocks", self.blocks)

    def with_blocks(self, indices: Sequence[int] | None) -> Sites:
        """Return these sites with the blocks of these indices only; None means all."""
        chosen = tuple(b for b in self.all_blocks if indices is None or b.index in indices)
        return replace(self, blocks=chosen, chosen_from=None)

    def only(self, where: str | Callable[[Block], bool]) -> Sites:
        """Return these sites with the blocks of a tower or an encoder only.

        Methods then leave the rest of the model alone, except for the head. `attach` saves the choice with the adapter.

        Args:
            where: Path of a module, such as `vision_model`, to stay inside it, with the patch embedding and the final
                norm that it holds; or a function that returns True for the blocks to keep.

        Raises:
            SiteNotFound: No block is there.
            UsageError: `where` is neither.
        """
        if not isinstance(where, str):
            if not callable(where):
                raise UsageError(f"only takes the path of one module or a function, not {type(where).__name__}")
            kept = tuple(block for block in self.blocks if where(block))
            if not kept:
                raise SiteNotFound(f"the function returned True for none of the {plural(len(self.blocks), 'block')}")
            return replace(self, blocks=kept, chosen_from=None)
        kept = tuple(block for block in self.blocks if is_within(block.path, where))
        if not kept:
            parents = dict.fromkeys(block.path.rpartition(".")[0] for block in self.blocks)
            raise SiteNotFound(
                f"{self.model} has no block inside {where!r}. Its blocks are in: {', '.join(parents) or 'none'}"
            )
        parts = {role: s for role, s in self.parts.items() if role == "head" or is_within(s.path, where)}
        return replace(self, blocks=kept, parts=parts, within=where, chosen_from=None)

    def choose(self, blocks: str | Sequence[int]) -> Sites:
        """Return these sites with the blocks that a method's option `blocks` chooses; `in:PATH` is `only(PATH)`.

        Raises:
            ConfigError, SiteNotFound: The model has no such blocks.
        """
        given = self if self.chosen_from is None else replace(self, chosen_from=None)
        if tower := path_of_tower(blocks):
            return replace(given.only(tower), chosen_from=given)
        indices = chosen_indices(blocks, [block.index for block in self.blocks], self.model)
        if len(indices) == len(self.blocks):
            return given
        return replace(given.with_blocks(indices), chosen_from=given)

    @property
    def given(self) -> Sites:
        """These sites as they were before a method's option `blocks` chose some."""
        return self if self.chosen_from is None else self.chosen_from

    def left_out_modules(self) -> set[nn.Module]:
        """Return the modules of the blocks that were left out."""
        chosen = {id(block.enter) for block in self.blocks}
        return modules_of(b for b in self.all_blocks if id(b.enter) not in chosen) - modules_of(self.blocks)

    @property
    def patch_embed(self) -> Site:
        """The patch embedding, from image to tokens."""
        return self._part("patch_embed", "patch embedding that petune can find")

    @property
    def norm(self) -> Site:
        """The final normalization."""
        return self._part("norm", "final norm that petune can find")

    @property
    def head(self) -> Site:
        """The classifier; of a model for detection or segmentation, all layers that predict."""
        advice = (
            "Build the model with the number of classes (timm: num_classes=N, or model.reset_classifier(N)); name the "
            'layers that predict, such as head=["visual_projection", "text_projection"] for two towers; or attach with '
            "train_head=False to train none"
        )
        return self._part("head", f"classifier. {advice}")

    def _part(self, role: str, missing: str) -> Site:
        if role in self.parts:
            return self.parts[role]
        raise SiteNotFound(f"{self.model} has no {missing}")

    def require_blocks(self) -> tuple[Block, ...]:
        """Return the blocks of a model that must have some.

        Raises:
            SiteNotFound: The model has none.
        """
        if not self.blocks:
            reason = f": {self.why_no_blocks}" if self.why_no_blocks else ""
            raise SiteNotFound(
                f"{self.model} has no attention block that petune can find{reason}. Use linear or full, which need none"
            )
        return self.blocks

    @property
    def input_size(self) -> tuple[int, ...]:
        """Size of one sample: (channels, height, width) of an image, with frames for a video."""
        return self.input_spec.size

    @property
    def image_grid(self) -> tuple[int, int] | None:
        """Patches as (rows, columns), of a model whose grid has no time; None for others."""
        if self.grid_size is None or len(self.grid_size) != 2:
            return None
        return self.grid_size[0], self.grid_size[1]

    @property
    def patch_size(self) -> tuple[int, int] | None:
        """Pixels (rows, columns) of a patch at the first block's input; None if unknown."""
        if self.grid_size is None or len(self.input_size) < 3:
            return None
        height, width = self.input_size[-2:]
        return height // self.grid_size[-2], width // self.grid_size[-1]

    def first_owner(self, site: Site) -> Block | None:
        """Return the earlier block with which the block of `site` shares that module; None for one of its own.

        Args:
            site: A site of a block, from `Block.parts`.
        """
        block = next((b for b in self.blocks if any(part is site for part in b.inner_sites)), None)
        earlier = [b for b in self.blocks if block is not None and b.index < block.index]  # some may be left out
        owners = (b for b in earlier if any(s.role == site.role and s.exit is site.exit for s in b.inner_sites))
        return None if site.read_only else next(owners, None)

    def __str__(self) -> str:
        grid = "?" if self.grid_size is None else "x".join(map(str, self.grid_size))
        title = (
            f"{self.model}: {plural(len(self.blocks), 'block')}, width {self.embed_dim}, grid {grid}, "
            f"{plural(self.num_prefix_tokens, 'prefix token')}, input {self.input_spec.text}"
        )
        rows = [("site", "where", "layout", "dim")]
        for name, site in self._rows():
            rows.append((name, "-", "-", "-") if site is None else (name, site.where, site.layout, str(site.dim)))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([title, *lines, *self.describe_heads()[1:]])

    def describe_choice(self) -> list[str]:
        """Return a line that says which blocks were chosen; empty for all."""
        if len(self.blocks) == len(self.all_blocks):
            return []
        indices = ", ".join(str(block.index) for block in self.blocks)
        return [f"blocks: {indices} of {len(self.all_blocks)}"]

    def describe_heads(self) -> list[str]:
        """Return lines that name the heads, and the layers before them; empty for a single classifier."""
        head = self.parts.get("head")
        if head is None or (head.is_module and not self.beside_head):
            return []
        before = [f"before the head, counted as backbone: {', '.join(self.beside_head)}"] if self.beside_head else []
        return [f"head: {head.where}", *before]

    __repr__ = __str__

    def _rows(self) -> list[tuple[str, Site | None]]:
        rows: list[tuple[str, Site | None]] = [("patch_embed", self.parts.get("patch_embed"))]
        for block in self.blocks:
            rows.append((f"block {block.index}", block))
            rows += [(f"  {role}", block.parts.get(role)) for role in ROLES]
        return [*rows, ("norm", self.parts.get("norm")), ("head", self.parts.get("head"))]


def is_within(path: str, parent: str) -> bool:
    """Return True if a module is the one at the path `parent`, or inside it."""
    return not parent or path == parent or path.startswith(f"{parent}.")


def modules_of(blocks: Iterable[Block]) -> set[nn.Module]:
    """Return the modules of blocks and of the sites inside, with all modules within them."""
    sites = [site for block in blocks for site in (block, *block.inner_sites)]
    return {m for site in sites for bound in site.modules for m in bound.modules()}
