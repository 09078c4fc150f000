"""All sites of one model; `print(sites)` is a table of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from petune.base.block_choice import chosen_in_rows, path_of_tower
from petune.base.errors import ConfigError, SiteNotFound, UsageError
from petune.base.text import plural
from petune.sites.input_spec import InputSpec
from petune.sites.own_layers import OwnLayers
from petune.sites.site import ROLES, Block, Site, Tower, is_within, modules_in, modules_of


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
        layers_before_head: Paths of layers between backbone and heads (for pooled features, necks, decoders); they
            count as backbone.
        outside_blocks: Paths of attentions, MLPs and linear layers, and keys of single parameters in products, that are
            in no block and no head, each with the index of the last block that begins before its last call.
        further_norms: Norms between blocks and heads that are not `norm`; see `Tower.norms`.
        layers: All layers of the blocks, and norms between these, also those that are at no site.
        chosen_head: Paths of the heads that `find_sites` was given; None if it found the heads itself.
        all_blocks: The model's blocks, also those that were left out by `only` or `dataclasses.replace(sites,
            blocks=…)`.
        within: The path that `only` was given; empty for the whole model.
        chosen_from: The sites of which a method's option `blocks` has chosen some; None if it is `all`.
        why_no_blocks: What was seen of attention in a model without blocks.
        all_towers: The model's towers, if it has several; see `towers`.
        num_outputs: Number of floating-point tensors that the model returns.
        draws_nothing: True if the model is large, and its forward in eval mode draws no random number.
    """

    model: str
    input_spec: InputSpec
    blocks: tuple[Block, ...]
    parts: Mapping[str, Site]
    num_prefix_tokens: int
    embed_dim: int
    grid_size: tuple[int, ...] | None
    layers_before_head: tuple[str, ...] = ()
    outside_blocks: Mapping[str, int] = field(default_factory=dict)
    further_norms: tuple[Site, ...] = ()
    layers: OwnLayers = field(default_factory=OwnLayers)
    chosen_head: tuple[str, ...] | None = None
    all_blocks: tuple[Block, ...] = ()
    within: str = ""
    chosen_from: Sites | None = None
    why_no_blocks: str = ""
    all_towers: tuple[Tower, ...] = ()
    num_outputs: int = 1
    draws_nothing: bool = False

    def __post_init__(self) -> None:
        if not self.all_blocks:
            object.__setattr__(self, "all_blocks", self.blocks)

    @property
    def towers(self) -> tuple[Tower, ...]:
        """The towers with those of their blocks that are among `blocks`, in the order of the forward.

        Most models have one: all blocks and `norm`. A model with several, such as CLIP's image and text, has no `norm`.
        """
        if not self.all_towers:
            return (Tower(blocks=self.blocks, norm=self.parts.get("norm"), further_norms=self.further_norms),)
        chosen = {id(block.enter) for block in self.blocks}
        kept = (replace(t, blocks=tuple(b for b in t.blocks if id(b.enter) in chosen)) for t in self.all_towers)
        return tuple(tower for tower in kept if tower.blocks)

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
        towers = tuple(tower.within(where) for tower in self.all_towers)
        norms = tuple(norm for norm in self.further_norms if is_within(norm.path, where))
        return replace(
            self, blocks=kept, parts=parts, within=where, chosen_from=None, all_towers=towers, further_norms=norms
        )

    def choose(self, blocks: str | Sequence[int]) -> Sites:
        """Return these sites with the blocks that a method's option `blocks` chooses; `in:PATH` is `only(PATH)`.

        In a model of several towers `last:K`, `first:K` and `every:K` choose blocks of each.

        Raises:
            ConfigError: The model has no such blocks.
        """
        given = self if self.chosen_from is None else replace(self, chosen_from=None)
        if tower := path_of_tower(blocks):
            try:
                return replace(given.only(tower), chosen_from=given)
            except SiteNotFound as error:
                raise ConfigError(f"blocks is {blocks}: {error}") from error
        rows = [[block.index for block in tower.blocks] for tower in self.towers]
        indices = chosen_in_rows(blocks, rows, self.model)
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

    def shared_with_left_out(self) -> set[nn.Module]:
        """Return the modules of the blocks that blocks which were left out call, too."""
        chosen = {id(block.enter) for block in self.blocks}
        others = [b for b in self.all_blocks if id(b.enter) not in chosen]
        return modules_of(others) & modules_of(self.blocks) if others else set()

    def block_modules(self) -> set[nn.Module]:
        """Return the modules that bound the blocks, of all that were found."""
        return {module for block in self.all_blocks for module in block.modules}

    def head_modules(self) -> set[nn.Module]:
        """Return all modules inside the heads; none for a model without."""
        return modules_in([self.parts["head"]]) if "head" in self.parts else set()

    @property
    def patch_embed(self) -> Site:
        """The patch embedding, from image to tokens."""
        return self._part("patch_embed", "patch embedding that petune can find")

    @property
    def norm(self) -> Site:
        """The final normalization, of a model with one tower."""
        paths = [tower.blocks[-1].path for tower in self.towers] if self.all_towers else []
        several = f"final norm of all blocks, but {len(paths)} towers, which end with {', '.join(paths)}"
        advice = "Use sites.towers, each with its norm, or sites.only(…) and blocks=in:PATH for one of them"
        return self._part("norm", f"{several}. {advice}" if len(paths) > 1 else "final norm that petune can find")

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
        if head is None or (head.is_module and not self.layers_before_head):
            return []
        before = ", ".join(self.layers_before_head)
        return [f"head: {head.where}", *([f"before the head, counted as backbone: {before}"] if before else [])]

    __repr__ = __str__

    def _rows(self) -> list[tuple[str, Site | None]]:
        rows: list[tuple[str, Site | None]] = [("patch_embed", self.parts.get("patch_embed"))]
        for block in self.blocks:
            rows.append((f"block {block.index}", block))
            rows += [(f"  {role}", block.parts.get(role)) for role in ROLES]
        norms: list[Site | None] = [*dict.fromkeys(norm for tower in self.towers for norm in tower.norms)] or [None]
        return [*rows, *(("norm", norm) for norm in norms), ("head", self.parts.get("head"))]
