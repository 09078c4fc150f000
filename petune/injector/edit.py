"""Edit: the verbs by which a tuner changes a model, and the log that undoes them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from petune.base.errors import AttachError, NotMergeable, SiteNotFound
from petune.injector.hooks.base import After, Before, Gather, Holder, InnerPrompts, Parallel, Prompts, once
from petune.injector.hooks.position_bias import Room, admit_prompts, fills, is_inside, refused
from petune.injector.hooks.prompt_check import Prompting
from petune.injector.hooks.prompt_windows import WindowHook, WindowPrompts, is_plain
from petune.injector.trainable import CONTAINERS, added_to, host_for, open_trainable_state
from petune.sites.probe import Call, is_pointwise, probe
from petune.sites.site import Block, Site, Sites, changeable, present, whole

Named = Iterable[tuple[nn.Module, str]]
DEEP = "Try prompts of each block's own (vpt:deep=true), or a method without prompts, such as adaptformer"
ALONE = "Attach one method with as many prompts, or switch the other off before (attachment.switch(False))"


class Edit:
    """What one tuner does to one model. A tuner gets it in `attach` and calls its verbs.

    A verb that is given a place raises SiteNotFound where the model does not have it, and AttachError where the place
    cannot be changed so, as a tensor between modules.

    Attributes:
        model: The model that is edited; look, but change it only by the verbs.
        sites: Its places.
        name: The attachment's name; adapters are registered as `petune_<name>`.
        holders: The adapters put in so far, with the places each needs to be passed.
        trained: The backbone's own parameters that were unfrozen.
        train_modules: The backbone's own modules that go to train mode.
        adopted, adopted_modules, adopted_buffers: What was put in by hand and is the tuner's.
        switches: Called with False where the attachment is disabled, with True where it is enabled again.
        checks, row_switches: See `before_enabled` and `on_rows`.
    """

    def __init__(self, model: nn.Module, sites: Sites, name: str) -> None:
        self.model, self.sites, self.name = model, sites, name
        self.holders: list[tuple[Holder, tuple[Site, ...]]] = []
        self.trained: list[nn.Parameter] = []
        self.train_modules: list[nn.Module] = []
        self.switches: list[Callable[[bool], None]] = []
        self.checks: list[Callable[[], object]] = []
        self.prompting = Prompting(model, sites)
        self.row_switches: list[Callable[[list[int] | None, int], None]] = []
        self.adopted: list[nn.Parameter] = []
        self.adopted_modules: list[nn.Module] = []
        self.adopted_buffers: list[tuple[nn.Module, str]] = []
        self._foreign = added_to(model)  # other attachments' parameters
        self._merges: list[Callable[[], object]] = []
        self._calls: dict[int, Call] | None = None
        self._undo: list[Callable[[], object]] = []

    def parallel(self, enter: Site | Sequence[Site] | None, exit: Site | None, adapter: nn.Module) -> None:
        """Add `adapter(what enters ENTER)` to what leaves EXIT.

        Args:
            enter: Where the adapter reads, for example `block.mid`; or several places, in the order of the forward.
            exit: Where its output is added, for example `block`.
            adapter: Maps (..., D of enter) to (..., D of exit); for several places, a list of such tensors.
        """
        if isinstance(enter, Sequence):
            self._gather(enter, changeable(self.sites, exit, "parallel"), adapter)
            return
        enter, exit = present(self.sites, enter, "parallel"), changeable(self.sites, exit, "parallel")
        holder = Parallel(adapter, enter.layout, exit.layout)
        self._put(holder, exit, enter, exit)
        self._hook(enter.enter.register_forward_pre_hook(holder.enter, with_kwargs=True))
        # innermost of all hooks, so that it meets the tokens as ENTER saw them; also after an exception
        self._hook(exit.exit.register_forward_hook(holder.leave, prepend=True, always_call=True))

    def before(self, site: Site | None, adapter: nn.Module) -> None:
        """Replace what enters `site` by `adapter(it)`, a map from (..., D) to (..., D)."""
        site = whole(changeable(self.sites, site, "before"), "before")
        holder = Before(adapter, site.layout)
        self._put(holder, site, site)
        self._hook(site.enter.register_forward_pre_hook(holder.enter, with_kwargs=True))

    def after(self, site: Site | None, adapter: nn.Module) -> None:
        """Replace what leaves `site` by `adapter(it)`, a map from (..., D) to (..., D)."""
        site = whole(changeable(self.sites, site, "after"), "after")
        holder = After(adapter, site.layout)
        self._put(holder, site, site)
        self._hook(site.exit.register_forward_hook(holder.leave, prepend=True))

    def prompt(self, blocks: Block | Sequence[Block], adapter: nn.Module) -> None:
        """Put tokens behind the prefix tokens where `blocks` are entered, and cut them out where they are left.

        Args:
            blocks: One block, or neighbours from first to last: the tokens pass through all of them.
            adapter: Has an attribute `num_prompts` and maps the (B, N, D) tokens to (1 or B, num_prompts, D).

        Raises:
            AttachError: A block looks at positions in a way that prompts would falsify without a word.
        """
        run = (blocks,) if isinstance(blocks, Block) else tuple(blocks)
        if not run:
            self.sites.need_blocks()
            raise SiteNotFound("prompt needs one block or more, but was given none")
        count = getattr(adapter, "num_prompts", None)
        if not isinstance(count, int) or count < 1:
            raise AttachError(
                f"a prompt adapter must have a whole number num_prompts of 1 or more, but that of "
                f"{type(adapter).__name__} is {count!r}"
            )
        self._refuse_others_prompts(run[0])
        self.before_enabled(functools.partial(self._refuse_others_prompts, run[0]))
        if is_inside(run[0]):
            self._prompt_attention(run, adapter, count)
        else:
            self._prompt_tokens(run, adapter, count)

    def prompt_span(self) -> tuple[Block, ...]:
        """The first block and those behind it with the same tokens: how far prompts go that enter the model there.

        It is all blocks, unless tokens are pooled or merged in between.
        """
        first, *others = self.sites.need_blocks()
        room = self.prompting.room(first, 1)
        fits = [first.dim == b.dim and self.prompting.room(b, 1) == room for b in others]
        return (first, *others[: (*fits, False).index(False)])

    def _prompt_tokens(self, run: tuple[Block, ...], adapter: nn.Module, count: int) -> None:
        room = self.prompting.room(run[0], count)
        for block in run:
            if block.dim != run[0].dim or self.prompting.room(block, count) != room:
                why = f"has other tokens than {run[0].path}, where they come in: they are pooled or merged in between"
                raise refused(block, self.sites, why, DEEP)
        self._admit(run, room)
        holder = Prompts(adapter, room, fills(run[0]))
        self._put(holder, run[0], run[0], run[-1])
        # outermost of all hooks: other adapters see the prompts as tokens, and nested prompts leave in turn
        self._hook(run[0].enter.register_forward_pre_hook(holder.enter, with_kwargs=True, prepend=True))
        for block in run[1:]:
            self._hook(block.enter.register_forward_pre_hook(holder.pass_through, with_kwargs=True, prepend=True))
        self._hook(run[-1].exit.register_forward_hook(holder.leave))
        self.prompting.prove(run, room)

    def _prompt_attention(self, run: tuple[Block, ...], adapter: nn.Module, count: int) -> None:
        block, attn = run[0], run[0].need("attn")
        room = self.prompting.room(block, count)
        self._admit(run, room)
        if len(run) > 1:
            self._pass_prompts(run, adapter, room)
            return
        norm = block.norm1 if block.norm_first else None
        if norm is not None and norm.enter in set(attn.enter.modules()):
            norm = None  # the attention normalises them itself
        holder = InnerPrompts(adapter, room, fills(block), norm)
        self._put(holder, block, attn)
        self._hook(attn.enter.register_forward_pre_hook(holder.enter, with_kwargs=True, prepend=True))
        self._hook(attn.exit.register_forward_hook(holder.leave))
        self.prompting.prove(run, room)

    def _pass_prompts(self, run: tuple[Block, ...], adapter: nn.Module, room: Room) -> None:
        for block in run[:-1]:
            with torch.no_grad():
                plain = is_plain(block, self.prompting.seen(block))
            if not plain or any(not is_inside(b) for b in run):
                why = "has no way out for them: they stay in its attention, and cannot go on to the next block"
                raise refused(block, self.sites, why, DEEP)
        holder = WindowPrompts(adapter, room, {}, None)
        self._put(holder, run[0], *(b.need("attn") for b in run))
        for block in run:
            leg, attn = WindowHook(holder, block, fills(block), (block is run[0], block is run[-1])), block.need("attn")
            self._hook(attn.enter.register_forward_pre_hook(leg.enter, with_kwargs=True, prepend=True))
            self._hook(attn.exit.register_forward_hook(leg.leave))
        # first of all hooks, for the attention may be what enters the block
        self._hook(run[0].enter.register_forward_pre_hook(holder.start, with_kwargs=True, prepend=True))
        self.prompting.prove(run, room)

    def _admit(self, run: tuple[Block, ...], room: Room) -> None:
        for block in run:
            for switch in admit_prompts(block, self.sites, room):
                told = once(switch, on=False)
                told(True)
                self.switches.append(told)
                self._undo.append(functools.partial(told, False))

    def _refuse_others_prompts(self, block: Site) -> None:
        own = {id(holder) for holder, _ in self.holders}
        if any(isinstance(m, Prompts) and m.enabled and id(m) not in own for m in self.model.modules()):
            raise refused(block, self.sites, "has prompts of another attachment, beside which none are proven", ALONE)

    def train(self, what: nn.Module | Site | Iterable[nn.Parameter]) -> None:
        """Unfreeze parameters the backbone already has.

        Args:
            what: A module or site, whose parameters train and which goes to train mode (dropout, BatchNorm), or
                single parameters, whose modules stay in eval mode. Other attachments' parameters are left out.
        """
        if isinstance(what, Site):
            whole(what, "train")
        for module in what.modules if isinstance(what, Site) else (what,) if isinstance(what, nn.Module) else ():
            self.train_modules.append(module)
            self.trained += (p for p in module.parameters() if id(p) not in self._foreign)
        if not isinstance(what, nn.Module | Site):
            self.trained += (p for p in what if id(p) not in self._foreign)

    def add_parameters(
        self, parameters: Iterable[nn.Parameter], modules: Iterable[nn.Module] = (), buffers: Named = ()
    ) -> None:
        """Take over what was put into the model by hand: it trains, is saved, and counts as the tuner's.

        Args:
            parameters: New ones.
            modules: New modules that go to train mode (dropout), whose buffers are saved.
            buffers: Single ones that are saved, by the module that holds them and their names there.
        """
        self.adopted += parameters
        self.adopted_modules += modules
        self.adopted_buffers += buffers

    def on_detach(self, fn: Callable[[], object]) -> None:
        """Call `fn` on detach, to undo something that was done by hand. Last done is first undone."""
        self._undo.append(fn)

    def on_switch(self, fn: Callable[[bool], None]) -> None:
        """Call `fn(False)` where the attachment is disabled, `fn(True)` where it is enabled again."""
        self.switches.append(once(fn, on=True))

    def before_enabled(self, check: Callable[[], object]) -> None:
        """Call `check` before the attachment is enabled again; it raises AttachError where that must not be."""
        self.checks.append(check)

    def on_rows(self, fn: Callable[[list[int] | None, int], None]) -> None:
        """Let what was done by hand take effect in some rows of a batch: `fn(rows, batch size)`; None is all rows."""
        self.row_switches.append(fn)

    def on_merge(self, fn: Callable[[], object]) -> None:
        """Call `fn` on merge, to fold in what was done by hand; it raises NotMergeable before it changes anything."""
        self._merges.append(fn)

    def linear_layers(self, site: Site | None, *, pointwise: bool = False) -> tuple[Site, ...]:
        """The backbone's Linear layers that the forward calls within `site`, in their order; found by one forward.

        Args:
            site: A place with extent.
            pointwise: Take 1×1 convolutions too, the linear layers of tokens that are laid out as an image.
        """
        site = present(self.sites, site, "linear_layers")
        calls = self._probed()
        first, last = calls.get(id(site.enter)), calls.get(id(site.exit))
        if first is None or last is None:
            return ()
        inside = [m for m in self._matrices() if id(m) in calls and (pointwise or isinstance(m, nn.Linear))]
        inside = [m for m in inside if first.start <= calls[id(m)].start and calls[id(m)].stop <= last.stop]
        return tuple(self.site(m) for m in sorted(inside, key=lambda m: calls[id(m)].start))

    def input_linears(self, site: Site | None) -> tuple[Site, ...]:
        """Those of `linears(site)` that are called with just the tensor that enters the site."""
        site = present(self.sites, site, "input_linears")
        calls = self._probed()
        return tuple(s for s in self.linear_layers(site) if calls[id(s.enter)].input is calls[id(site.enter)].input)

    def uncalled_linears(self, site: Site | None) -> tuple[Site, ...]:
        """Linear layers inside the modules of `site` that the forward never calls: their weights are read instead."""
        site = present(self.sites, site, "uncalled_linears")
        inside = {id(m) for module in site.modules for m in module.modules()}
        linears = [m for m in self._matrices() if isinstance(m, nn.Linear)]
        return tuple(self.site(m) for m in linears if id(m) in inside and id(m) not in self._probed())

    def use_qkv_module(self, site: Site | None) -> None:
        """Tell attentions that can either read or call their qkv layer to call it, as adapters need (timm: EVA, BEiT).

        The result is the same up to rounding; disabled and detached, the model reads it again.
        """
        ledger = open_trainable_state(self.model, self.sites)
        for module in present(self.sites, site, "use_qkv_module").enter.modules():
            if getattr(module, "qkv_bias_separate", None) is False or module in ledger.awake:
                switch = functools.partial(ledger.use_qkv_module, module, self.name)
                switch(True)
                self.switches.append(switch)
                self._undo.append(functools.partial(switch, False))
                self._calls = None

    def called(self, modules: Iterable[nn.Module]) -> set[int]:
        """Identities of those of `modules` that one forward calls."""
        wanted = list(modules)
        return set(probe(self.model, self.sites, wanted)) if wanted else set()

    def backbone(self) -> list[nn.Module]:
        """The backbone's own modules: without the classifier, without what attachments have added."""
        head = {id(m) for h in self.sites.head.modules for m in h.modules()} if self.sites.head else set()
        return [
            m
            for m in self.model.modules()
            if id(m) not in head and not any(id(p) in self._foreign for p in m.parameters(recurse=False))
        ]

    def site(self, module: nn.Module, dim: int | None = None) -> Site:
        """A Site for any module of the model, for tuners that edit single layers.

        Raises:
            SiteNotFound: The model does not hold the module.
        """
        for path, candidate in self.model.named_modules():
            if candidate is module:
                path = path.removesuffix(".base_layer")  # where PEFT has put a layer of its own around it
                width = dim if dim is not None else next((p.shape[-1] for p in module.parameters()), 0)
                edge = {"path": path, "enter": module, "exit_path": path, "exit": module}
                return Site(role=path.rsplit(".", 1)[-1], dim=width, layout="BNC", model=self.sites.model, **edge)
        raise SiteNotFound(f"the {type(module).__name__} to edit must be a part of {self.sites.model}, but is not")

    @property
    def folds(self) -> bool:
        """Whether there is something to fold; what trained in place is where it belongs."""
        return bool(self.holders or self._merges)

    def added_parameters(self) -> list[nn.Parameter]:
        """What the edit has put in, by verbs and by hand."""
        return [*(p for holder, _ in self.holders for p in holder.parameters()), *self.adopted]

    def added_tensors(self) -> list[torch.Tensor]:
        """The same, and their buffers."""
        modules = [*(holder for holder, _ in self.holders), *self.adopted_modules]
        single = [b for m, name in self.adopted_buffers if (b := m._buffers.get(name)) is not None]
        return [*self.added_parameters(), *(b for m in modules for b in m.buffers()), *single]

    def merge(self, name: str) -> None:
        """Fold every adapter into the weights of its site; to undo and, where folding fails, to put the weights back
        is left to the caller.

        Raises:
            NotMergeable: The reason is named.
        """
        for holder, passed in self.holders:
            why = getattr(holder.adapter, "why_not_mergeable", None)
            if why is None and not callable(getattr(holder.adapter, "merge", None)):
                why = "its adapter defines no merge(module)"
            if why:
                raise NotMergeable(f"{name} cannot be folded into the weights of {passed[-1].where}: {why}")
        for fold in self._merges:
            fold()
        for holder, passed in reversed(self.holders):  # the innermost hook was put in last
            holder.adapter.merge(passed[-1].exit)  # type: ignore[operator]

    def settle(self) -> None:
        """Forget the forwards by which the tuner chose its places: they hold every activation of an image."""
        self._calls = None
        self.prompting = Prompting(self.model, self.sites)

    def undo(self) -> None:
        """Undo everything, last first; the model is as it was."""
        for holder, _ in self.holders:
            holder.forget()
        while self._undo:
            self._undo.pop()()

    def _gather(self, enters: Sequence[Site], exit: Site, adapter: nn.Module) -> None:
        holder = Gather(adapter, tuple(site.layout for site in enters), exit.layout)
        self._put(holder, exit, *enters, exit)
        for place, site in enumerate(enters):
            self._hook(site.enter.register_forward_pre_hook(holder.enter if place else holder.begin, with_kwargs=True))
        self._hook(exit.exit.register_forward_hook(holder.leave, prepend=True, always_call=True))

    def _matrices(self) -> list[nn.Module]:
        return [m for m in self.backbone() if isinstance(m, nn.Linear) or is_pointwise(m)]

    def _probed(self) -> dict[int, Call]:
        if self._calls is None:
            inner = [getattr(b, role) for b in self.sites.blocks for role in ("attn", "mlp", "norm1", "norm2")]
            places = [*self.sites.blocks, *(s for s in inner if s is not None)]
            watched = [*self._matrices(), *(m for s in places for m in s.modules)]
            self._calls = probe(self.model, self.sites, {id(m): m for m in watched}.values())
        return self._calls

    def _put(self, holder: Holder, beside: Site, *passed: Site) -> None:
        """Register the holder beside its site, with the site's device and number format, under a free name."""
        host = self._host(beside)
        role = "" if isinstance(beside, Block) else f"_{beside.role}"
        base = f"petune_{self.name}{role}"
        attribute, number = base, 1
        while hasattr(host, attribute):
            attribute, number = f"{base}_{number}", number + 1
        holder.to(next((p for p in self._weights(beside) if p.is_floating_point()), torch.empty(0, device="cpu")))
        holder.train(self.model.training)
        host.add_module(attribute, holder)
        self._undo.append(lambda: delattr(host, attribute))
        self.holders.append((holder, passed))

    def _host(self, site: Site) -> nn.Module:
        """The site's block for a block, else the module around the site; never a container that calls its children."""
        if isinstance(site, Block):
            return host_for(site.exit)
        parent = self.model.get_submodule(site.exit_path.rpartition(".")[0])
        return (
            site.exit if isinstance(parent, CONTAINERS) and not isinstance(site.exit, CONTAINERS) else host_for(parent)
        )

    def _weights(self, site: Site) -> Iterable[nn.Parameter]:
        yield from site.exit.parameters()
        yield from self.model.parameters()

    def _hook(self, handle: torch.utils.hooks.RemovableHandle) -> None:
        self._undo.append(handle.remove)
