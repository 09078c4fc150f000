"""`Edit`: the verbs by which a tuner changes a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import overload

from torch import Tensor, nn

from petune.injector.attention import Attention, find_attention
from petune.injector.edit_log import ChangedLayer, EditLog
from petune.injector.hooks.around import Around
from petune.injector.hooks.base import idempotent, resting
from petune.injector.hooks.keys_values import KeysValues
from petune.injector.hooks.side import Side
from petune.injector.hooks.torch_attention import Projections
from petune.injector.layers import LayerFinder
from petune.injector.placement import Placer
from petune.injector.prompt_placement import PromptPlacer
from petune.injector.sparse import SparseParameters
from petune.injector.sparse_placement import SparsePlacer
from petune.injector.token_grid import TokenGrid, patch_convolution
from petune.injector.trainable import TrainableState
from petune.sites.required import (
    require_all_channels,
    require_block,
    require_parameters,
    require_site,
)
from petune.sites.site import Block, Site
from petune.sites.sites import Sites


class Edit:
    """The changes that one tuner makes to one model. `attach` gives it to the tuner, which calls its verbs.

    Every change is undone by `Attachment.detach`. Ask for a site by name, such as `block.attn`: it raises SiteNotFound
    if the model does not have it. A verb raises AttachError if it cannot change the site, such as a tensor between two
    modules.

    Several adapters at one site act in this order, over all attachments: what is between modules (`stream`, and
    `parallel` that reads it); then `around`, the last declared outermost; inside it `before`, `after`, `parallel` and
    `side`, in the order in which they were declared. An adapter that calls a module of the backbone, or its `inner`,
    runs it with all adapters but itself.

    Parameters of an adapter train, except those that have `requires_grad=False` when `Tuner.attach` returns: they are
    saved, as buffers are.

    Attributes:
        model: The model that is edited. Read it, but change it only by the verbs.
        sites: Its sites.
        name: The attachment's name; adapters are registered as `petune_<name>`.
    """

    def __init__(self, model: nn.Module, sites: Sites, log: EditLog, state: TrainableState) -> None:
        self.model = model
        self.sites = sites
        self.name = log.label
        self._state = state
        self._layers = LayerFinder(model, sites)
        self._open_placer = Placer(model, sites, log, state)
        self._prompts = PromptPlacer(model, sites, self._open_placer)

    @property
    def _placer(self) -> Placer:
        """Return what puts adapters into the model; refuse after detach, when nothing would take them out again."""
        self._open_placer.log.check_open()
        return self._open_placer

    @property
    def _log(self) -> EditLog:
        return self._placer.log

    # Change the forward

    def parallel(self, enter: Site | Sequence[Site], exit: Site, adapter: nn.Module, *, leaving: bool = False) -> None:
        """Add `adapter(what enters ENTER)` to what leaves EXIT.

        Args:
            enter: Where the adapter reads, for example `block.mid`; or several sites, in the order of the forward.
            exit: Where its output is added, for example `block`.
            adapter: Maps (..., D of enter) to (..., D of exit); for several sites, a list of such tensors.
            leaving: Read what leaves ENTER instead.
        """
        self._placer.parallel(enter, exit, adapter, leaving=leaving)

    def before(self, site: Site, adapter: nn.Module) -> None:
        """Replace what enters `site` by the adapter's output, a map from (..., D) to (..., D)."""
        self._placer.before(site, adapter)

    def after(self, site: Site, adapter: nn.Module) -> None:
        """Replace what leaves `site` by the adapter's output, a map from (..., D) to (..., D)."""
        self._placer.after(site, adapter)

    def stream(self, site: Site, adapter: nn.Module) -> None:
        """Replace the residual stream once at a tensor between modules, such as `block.mid`.

        Everything that reads the stream after that, the norm before the MLP and the residual sum, sees the adapter's
        output. In a post-norm block this is what leaves the first norm. Where attention and MLP read one tensor, it is
        what enters the block.

        Args:
            site: A tensor between modules; for what enters or leaves a module use `before` and `after`.
            adapter: Maps (..., D) to (..., D).
        """
        self._placer.stream(site, adapter)

    def around(self, site: Site | Sequence[Site], adapter: nn.Module) -> None:
        """Replace what a site computes by `adapter(inner, x)`, with x what enters it.

        The adapter calls `inner` as often as it likes, also not at all, and with any number of images or tokens:
        `inner(x)` is what the site makes of (..., D), with all other adapters there; what they read before, outside of
        the site, is the same in each call. A call under `torch.no_grad()` trains nothing inside. At a block with
        prompts, x is without them: they enter and leave inside of `inner`.

        Args:
            site: A site, or several that the model calls one after another, such as all blocks and the final norm.
            adapter: Maps the function `inner` and (..., D) to a tensor of the same images and tokens.

        Raises:
            AttachError: The model's own code does something between the modules of the site.
        """
        self._placer.around(site, adapter)

    def side(self, sites: Sequence[Site | Attention], cell: nn.Module, *, leaving: bool = False) -> None:
        """Run a side network: a state of its own, which one cell carries from site to site.

        Args:
            sites: Different modules of the model, such as all blocks, in the order of the forward.
            cell: Called at each site as `cell(state, x, index)`, with x what enters it, (..., D), and the state None at
                index 0. Returns the next state, a tensor of any shape, and what is added to what leaves this site, or
                None. To keep gradients out of the backbone, detach x and add at the last site only. At an `attention`
                x is the list of its keys and values, (B, heads, N, D) each, which further queries can attend to. Rotary
                positions are in the keys; the queries have none, as a class token.
            leaving: Read what leaves each site instead.

        Raises:
            AttachError: An attention hides tokens, adds a bias of positions (BEiT, Swin) or mixes heads, so that more
                than q · k decides what its tokens attend to.
        """
        self._placer.side(sites, cell, leaving=leaving)

    def prompt(self, blocks: Block | Sequence[Block], adapter: nn.Module) -> None:
        """Insert tokens behind the prefix tokens on entry to `blocks`, and remove them on exit.

        Args:
            blocks: One block, or neighbors from first to last: the tokens pass through all of them.
            adapter: Has an attribute `num_prompts` and maps the (B, N, D) tokens to (1 or B, num_prompts, D).

        Raises:
            AttachError: A block uses token positions in a way that prompts would silently break.
        """
        self._log.check_open()
        self._prompts.place(blocks, adapter)

    def keys_values(self, block: Block, adapter: nn.Module) -> None:
        """Let the tokens of a block attend to further keys and values, besides their own.

        Masks and biases of positions are extended: every token attends to the new keys, with a bias of zero.

        Args:
            block: A block with one attention.
            adapter: Maps the (B, N, D) tokens that enter the attention to keys and values, each of shape (1 or B,
                number, num_kv_heads · width of a head); see `attention`.

        Raises:
            AttachError: The attention computes in a way that petune does not know, or has such an adapter.
        """
        self._placer.add_keys_values(self.attention(block), adapter)

    # Train what is there

    @overload
    def train(self, target: nn.Module | Site | Iterable[nn.Parameter]) -> list[nn.Parameter]: ...

    @overload
    def train(
        self, target: nn.Module | Site | Iterable[nn.Parameter], *, mask: Sequence[Tensor]
    ) -> SparseParameters: ...

    def train(
        self, target: nn.Module | Site | Iterable[nn.Parameter], *, mask: Sequence[Tensor] | None = None
    ) -> list[nn.Parameter] | SparseParameters:
        """Unfreeze parameters that the backbone already has, or some of their entries.

        Args:
            target: A module or site, whose parameters train and which goes to train mode (dropout, BatchNorm); a block
                that is no module is all modules that it consists of. Or single parameters, whose modules stay in eval
                mode.

        Returns:
            The parameters that train now. Those that other attachments have added are left out, and those that the
            model's author has fixed with requires_grad=False.
        """
        modules = _modules_of(require_all_channels(target, "train") if isinstance(target, Site) else target)
        parameters = [p for m in modules for p in m.parameters()]
        if not isinstance(target, nn.Module | Site):
            parameters = require_parameters(target, "train")
        given, fixed = parameters, {id(p) for p in self._state.fixed}
        parameters = [p for p in given if id(p) not in fixed]
        self._log.left_fixed += [p for p in given if id(p) in fixed]
        placer = SparsePlacer(self._placer)
        if mask is not None:
            if given and not parameters:
                placer.refuse_fixed(given)
            if len(parameters) < len(given) == len(mask):
                mask = [entries for p, entries in zip(given, mask, strict=True) if id(p) not in fixed]
            return placer.train_entries(parameters, mask)
        placer.refuse_trained(parameters)
        own = [p for p in parameters if id(p) not in self._layers.others]
        self._log.train_modules += modules
        self._log.unfrozen += own
        return own

    # Look

    def linear_layers(self, site: Site, *, pointwise: bool = False, transposed: bool = False) -> tuple[Site, ...]:
        """Return the backbone's linear layers that the forward calls within `site`, in the order of the calls.

        A qkv layer whose weight an attention only reads is listed where timm can call it instead (EVA, BEiT,
        Swin-V2); `before`, `after` and `parallel` at that layer then make the attention call it. A layer that several
        blocks share is listed for the first of them only: an adapter there acts in all.

        Args:
            site: A site with an extent, such as `block.attn`.
            pointwise: Also list 1×1 convolutions, the linear layers of tokens that are laid out as an image.
            transposed: Also list transformers' Conv1D, linear layers that hold their weight as (inputs, outputs).
        """
        site = require_site(site, "linear_layers")
        return self._layers.linear_layers(site, pointwise=pointwise, transposed=transposed)

    def attention(self, block: Block) -> Attention:
        """Return how a block attends: q, k and v as sites of whatever layers make them, heads and scale.

        `edit.after(edit.attention(block).q, adapter)` changes q alone, also where one layer makes q, k and v.

        Raises:
            SiteNotFound: The block has no attention, or several.
            AttachError: No softmax of q · k was found there.
        """
        layers = self.linear_layers(require_block(block, "attention").attn, pointwise=True, transposed=True)
        known = self._state.projections
        with resting(self.model, Around, KeysValues, Projections, Side):
            return find_attention(self.model, self.sites, block, layers, known)

    def input_linears(self, site: Site) -> tuple[Site, ...]:
        """Return those of `linear_layers(site)` that are called with exactly the tensor that enters the site."""
        return self._layers.input_linears(require_site(site, "input_linears"))

    def uncalled_linears(self, site: Site) -> tuple[Site, ...]:
        """Return the linear layers inside `site` that the forward never calls, because it reads their weights."""
        return self._layers.uncalled_linears(require_site(site, "uncalled_linears"))

    def prompt_span(self, first: Block | None = None) -> tuple[Block, ...]:
        """Return the blocks that prompts can pass through when they enter at the first one.

        These are all blocks of its tower, unless tokens are pooled or merged between two of them.

        Args:
            first: The block where they enter; by default the first one of the model.
        """
        return self._prompts.span(first)

    def token_grid(self) -> TokenGrid:
        """Return the grid of patches of each call: `token_grid.of(num_tokens)` inside an adapter, at any image size."""
        placer, grid = self._placer, TokenGrid(self.sites)
        self.sites.require_blocks()
        maker = patch_convolution(self.model, self.sites)
        handles = grid.watch(self.model) if maker is None else [maker.register_forward_hook(grid.leave)]
        for handle in handles:
            placer.hook(handle)
        return grid

    def backbone(self) -> list[nn.Module]:
        """Return the backbone's own modules.

        Left out are the classifier, what attachments have added, and blocks that the user left out of the sites.
        """
        return self._layers.backbone()

    def used(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Return those of `parameters` that the model's output depends on."""
        candidates = list(parameters)
        used = self._layers.used(candidates)
        ids = {id(p) for p in used}
        self._log.unused += [p for p in candidates if id(p) not in ids]
        return used

    def called(self, modules: Iterable[nn.Module]) -> set[nn.Module]:
        """Return those of `modules` that a forward calls now."""
        return self._layers.called(modules)

    def routed(self, modules: Iterable[nn.Module]) -> set[nn.Module]:
        """Return those of `modules` that are in experts that a router chooses for other images than black ones."""
        return self._layers.routed(modules)

    def site(self, module: nn.Module, dim: int | None = None) -> Site:
        """Return a Site for any module of the model, to edit single layers.

        Args:
            module: A module of `model`.
            dim: Width of the tokens there; by default the last axis of the module's first parameter.

        Raises:
            SiteNotFound: The model does not hold the module.
        """
        return self._layers.site(module, dim)

    # Change something by hand

    def add_parameters(
        self,
        parameters: Iterable[nn.Parameter],
        modules: Iterable[nn.Module] = (),
        buffers: Iterable[tuple[nn.Module, str]] = (),
        wrappers: Iterable[nn.Module] = (),
        masks: Mapping[nn.Parameter, Tensor] = MappingProxyType({}),
    ) -> None:
        """Register what was put into the model by hand: it trains, is saved, and counts as the tuner's.

        Parameters with `requires_grad=False` are saved and do not train.

        Args:
            parameters: New parameters.
            modules: New modules, which go to train mode (dropout) and whose buffers are saved.
            buffers: Single buffers that are saved, as (module that holds it, name there).
            wrappers: New modules around the backbone's own. They go to train mode, the modules inside them do not.
            masks: For some of the parameters, a boolean tensor of its shape: entries that are False stay zero, and do
                not count.

        Raises:
            AttachError: A mask has another shape or dtype, or no true entry.
        """
        SparsePlacer(self._placer).keep_zero(masks)
        self._log.added_parameters += parameters
        self._log.added_modules += modules
        self._log.added_buffers += buffers
        self._log.wrappers += wrappers

    def use_qkv_module(self, site: Site) -> None:
        """Let attentions call their qkv layer where they only read its weight (timm: EVA, BEiT, Swin-V2).

        Only needed before a layer is replaced by hand; `before`, `after` and `parallel` do this themselves. The result
        is the same up to rounding. Disabled and detached, the model reads the weight again.
        """
        self._placer.call_qkv_within(require_site(site, "use_qkv_module"))

    def on_toggle(
        self,
        fn: Callable[[bool], None],
        *,
        check: Callable[[], object] | None = None,
        layers: Mapping[nn.Module, Callable[[bool], object]] | None = None,
        additions: Mapping[nn.Module, Callable[[Tensor], Tensor]] | None = None,
    ) -> None:
        """Call `fn(False)` when the attachment is disabled and `fn(True)` when it is enabled again.

        Args:
            fn: Switches off, and on again, what was changed by hand.
            check: Called before the attachment is enabled again; raises AttachError to forbid it.
            layers: The layers that are changed, each with a switch for this layer alone: `AdapterBank` calls such a
                layer once for the rows of each adapter. Empty if the change does not affect results. Without it,
                `AdapterBank` runs these rows in a separate forward pass.
            additions: For those of the layers whose change is only an addition: what maps the layer's input to what is
                added to its output. `AdapterBank` then calls the layer once for all rows.
        """
        self._log.toggles.append(idempotent(fn, on=True))
        if check is not None:
            self._log.enable_checks.append(check)
        if layers is None:
            self._log.changes_all_rows = True
        for layer, switch in (layers or {}).items():
            self._log.changed_layers[layer] = ChangedLayer(switch, (additions or {}).get(layer))

    def on_merge(self, fn: Callable[[], object]) -> None:
        """Call `fn` on merge, to fold in what was changed by hand.

        It must raise NotMergeable before it changes anything.
        """
        self._log.merges.append(fn)

    def on_detach(self, fn: Callable[[], object]) -> None:
        """Call `fn` on detach, to undo what was changed by hand. The last registered one is called first."""
        self._log.undo_steps.append(fn)


def forget_forwards(edit: Edit) -> None:
    """Drop the forward passes that the verbs recorded: they keep all activations of one image in memory."""
    edit._layers.forget()
    edit._prompts.forget()


def _modules_of(target: nn.Module | Site | Iterable[nn.Parameter]) -> tuple[nn.Module, ...]:
    """Return the modules that train; none for single parameters."""
    if isinstance(target, Block):
        return target.own_modules
    return target.modules if isinstance(target, Site) else (target,) if isinstance(target, nn.Module) else ()
