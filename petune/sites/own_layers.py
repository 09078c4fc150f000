"""Name all layers of a model, also those that are at no site, for methods that act on each layer or norm."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from petune.sites.encoder import calls_of, end_of, start_of
from petune.sites.flow import INPUTS
from petune.sites.further_norms import norms_read_by_blocks
from petune.sites.input_spec import InputSpec
from petune.sites.outside_blocks import largest_without, last_before
from petune.sites.parameter_uses import LAYER_USES
from petune.sites.site import Block, Site, is_within, modules_in, modules_with_place
from petune.sites.trace import Call, Trace, own_weights
from petune.sites.used_parameters import used_parameters


@dataclass(frozen=True, eq=False, kw_only=True)
class OwnLayers:
    """Layers and parameters by what the forward does with them, whether or not they are at a site.

    A layer is a module with parameters of its own, named by its path; or a parameter that other code gives to a product
    or a norm, named by its key. Embeddings, tables, tokens, and factors of channels (LayerScale) are none.

    Attributes:
        in_blocks: The layers in blocks, each with its block's index.
        of_constants: The layers in blocks that compute the same for all inputs, such as the small network that makes a
            table of positions (Swin-V2).
        outside: The largest modules with layers, and single parameters, that are in no block and no head, and come
            after the first block begins, each with the index of the last block that begins before. Not among them are
            final norms, what begins another tower, and what changes the tokens' number or width between two blocks.
        norms_between: The norms outside blocks that a later block reads, such as an encoder's before its decoder, and
            parameters that code outside blocks gives to a norm, likewise.
        norms: Scale and bias of all functions that are norms, as the module that holds each and its name there.
        biases: The biases that linear layers, convolutions and norms take, likewise.
    """

    in_blocks: Mapping[str, int] = field(default_factory=dict)
    of_constants: frozenset[str] = frozenset()
    outside: Mapping[str, int] = field(default_factory=dict)
    norms_between: Mapping[str, int] = field(default_factory=dict)
    norms: tuple[tuple[nn.Module, str], ...] = ()
    biases: tuple[tuple[nn.Module, str], ...] = ()


def own_layers(
    trace: Trace,
    spec: InputSpec,
    rows: Sequence[Sequence[Block]],
    known: Sequence[Site],
    head: Site | None,
    others: Iterable[str],
) -> OwnLayers:
    """Return the layers of a model.

    Args:
        trace: The forward.
        spec: What the model takes.
        rows: The blocks of each tower.
        known: Its final norms, which are at sites.
        head: Its layers do not count.
        others: Paths of modules outside blocks that are named already.
    """
    blocks = [*dict.fromkeys(block for row in rows for block in row)]
    layers = _Layers(trace)
    in_blocks: dict[str, int] = {}
    for block in blocks:
        for module in dict.fromkeys(m for own in block.own_modules for m in own.modules()):
            in_blocks |= {path: block.index for path in layers.at(module) if path not in in_blocks}
    placed = modules_with_place(blocks, head) | modules_in(known)
    ends = [*calls_of(trace, blocks), *(c for c in trace.calls if head is not None and c.module in head.modules)]
    outside = _outside(layers, blocks, placed, ends, several=len(rows) > 1) if blocks else []
    outside = [(named, layer, i) for named, layer, i in outside if not any(is_within(layer, path) for path in others)]
    used = _used(trace.root.module, spec, [layer for _, layer, _ in outside])
    outside = [found for found in outside if found[1] in used]
    read = {c.path for c in norms_read_by_blocks(trace, blocks, head, trace.calls)} if outside else set()
    bare = {key for key, found in trace.uses.items() if "norm" in found or "norm bias" in found}
    return OwnLayers(
        in_blocks=in_blocks,
        of_constants=_that_read_no_input(trace, in_blocks),
        outside={named: index for named, _, index in outside},
        norms_between={layer: index for _, layer, index in outside if layer in read | bare},
        norms=_parameters_that_are(trace, {"norm", "norm bias"}),
        biases=_parameters_that_are(trace, {"bias", "norm bias"}),
    )


def _that_read_no_input(trace: Trace, layers: Iterable[str]) -> frozenset[str]:
    """Return those of some layers of which no call gets anything that was computed from the model's inputs."""
    wanted = {*layers}
    calls = [c for c in trace.calls if c.path in wanted]
    sources = trace.flow.sources({INPUTS: INPUTS}, [c.start for c in calls])
    reading = {c.path for c in calls if sources.get(c.start, True)}
    return frozenset({c.path for c in calls} - reading)


def _parameters_that_are(trace: Trace, uses: set[str]) -> tuple[tuple[nn.Module, str], ...]:
    """Return the parameters that are one of some things in an operation."""
    root = trace.root.module
    keys = [key.rpartition(".") for key, found in trace.uses.items() if not uses.isdisjoint(found)]
    return tuple((root.get_submodule(path), name) for path, _, name in keys)


class _Layers:
    """Tells which layers a module is, or holds itself."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.paths = {module: path for path, module in trace.root.module.named_modules()}
        self.calls = {id(call.module): call for call in trace.calls}
        scaled = ((scaling.tensor, scaling.product) for scaling in trace.scalings if scaling.is_own)
        self._scaled = {id(y): x for x, y in (*trace.casts, *scaled) if x is not y}

    def at(self, module: nn.Module) -> Iterator[str]:
        """Yield the path of a module that is a layer; of one around others the keys of its own layers' parameters."""
        own, path, call = own_weights(module), self.paths.get(module), self.calls.get(id(module))
        if not own or path is None or isinstance(module, nn.Embedding):
            return
        keys = [key for key, p in module.named_parameters(path) if any(p is weight for weight in own)]
        uses = {use for key in keys for use in self.trace.uses.get(key, ())}
        if len(own) < len([*module.parameters()]):
            yield from (key for key in keys if not LAYER_USES.isdisjoint(self.trace.uses.get(key, ())))
        elif call is None:  # the model reads its weights
            if not uses <= {"table", "factor", "bias"}:
                yield path
        elif not _is_table(call, uses) and not (uses == {"factor"} and self._scales(call)):
            yield path

    def time(self, layer: str) -> int:
        """Return when a parameter, or one of a module's, is first that of a layer; 0 for never."""
        uses = (found for key, found in self.trace.uses.items() if is_within(key, layer))
        return min((time for found in uses for use, time in found.items() if use in LAYER_USES), default=0)

    def _scales(self, call: Call) -> bool:
        """Return whether a module returns its input times one number for each channel, as LayerScale does."""
        y = call.output
        while y is not None and y is not call.input:
            y = self._scaled.get(id(y))
        return y is not None and not call.normalizes


def _is_table(call: Call, uses: set[str]) -> bool:
    """Return whether a module makes something of no features, or its parameters are only added or looked up."""
    return not any(x.is_floating_point() for x in call.inputs) or (bool(uses) and uses <= {"table"})


def _outside(
    layers: _Layers, blocks: Sequence[Block], placed: set[nn.Module], ends: Sequence[Call], *, several: bool
) -> list[tuple[str, str, int]]:
    """Return what is named for each layer outside blocks, the layer, and the index of the last block before it.

    Args:
        layers: Tells what is a layer.
        blocks: All blocks.
        placed: Modules of blocks, final norms and heads.
        ends: Calls of blocks and heads, which no module that is named holds.
        several: True for several towers: what reads no block begins the next tower.
    """
    trace = layers.trace
    begun = [(c.start, block.index) for block in blocks for c in trace.calls if c.module is block.enter]
    start, end = start_of(trace, blocks), end_of(trace, blocks)
    targets = [call.start for call in layers.calls.values()] if several else []
    reading = trace.flow.sources({c.start: c.start for c in calls_of(trace, blocks)}, targets)
    found = []
    for module in layers.paths.keys() - placed:
        call = layers.calls.get(id(module))
        around = largest_without(call, ends) if call is not None else None
        if around is not None and around.stop < end and not around.keeps_shape:
            continue
        for layer in layers.at(module):
            time = call.start if call is not None and around is not None else layers.time(layer)
            if time > start and reading.get(time, True):
                found.append((time, around.path if around is not None else layer, layer))
    named = {path for _, path, _ in found}
    inner = {path for path in named for other in named - {path} if is_within(path, other)}
    return [(path, layer, last_before(begun, time)) for time, path, layer in sorted(found) if path not in inner]


def _used(model: nn.Module, spec: InputSpec, layers: Sequence[str]) -> set[str]:
    """Return those of some modules and single parameters that the output depends on."""
    every = dict(model.named_parameters(remove_duplicate=False))
    own = {layer: [p for key, p in every.items() if is_within(key, layer)] for layer in layers}
    candidates = [p for parameters in own.values() for p in parameters if p.is_floating_point()]
    used = {id(p) for p in used_parameters(model, spec, candidates)} if candidates else set()
    return {layer for layer, parameters in own.items() if any(id(p) in used for p in parameters)}
