"""PEFT's layers in a model: put in, named as before, switched, packed into PEFT's format, merged, taken out."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

import petune

PREFIX = "base_model.model."
SHARES = {"FROD", "RANDLORA", "VERA"}
ONE_TYPE = "Attach one PEFT type at a time, or several of the same"


class Wrapped:
    """The layers that one attachment has wrapped.

    Attributes:
        name: The adapter's name inside PEFT.
        config: PEFT's config.
        layers: By path, PEFT's layers.
    """

    def __init__(self, edit: petune.Edit, config: Any, wanted: list[str]) -> None:
        self.edit, self.model, self.config = edit, edit.model, config
        self.name = f"petune_{edit.name}"  # PEFT takes it out of keys again, so it must not be a module's name
        self.added_modules: list[nn.Module] = []
        self._refuse_shared()
        modules, parameters = set(self.model.modules()), {id(p) for p in self.model.parameters()}
        before = dict(_layers(self.model))
        active = {layer: _active(layer) for layer in before.values()}
        buffers = {(module, name) for module in modules for name in module._buffers}
        self.done = False
        edit.on_detach(self._undo(hasattr(self.model, "peft_config"), active))
        self.tuner = self._put_in()
        self.layers = {path: layer for path, layer in _layers(self.model) if self.name in _adapters(layer)}
        for layer in self.layers.values():
            if isinstance(layer.get_base_layer(), nn.MultiheadAttention):
                self._bare(layer)
        self._check(wanted, before)
        for layer in self.layers.values():
            _fix_constants(layer)
        if config.peft_type.value == "ADALORA":
            config.inference_mode = True  # what trains is petune's to say, and PEFT would allow but one a model
            if config.rank_pattern:  # as PEFT has left it after a training: fewer ranks
                self.tuner.resize_modules_by_rank_pattern(config.rank_pattern, self.name)
        self._adopt(modules, parameters, buffers)
        for layer in self.layers.values():
            _name_as_before(layer)
        for layer in {**active, **dict.fromkeys(self.layers.values())}:  # PEFT has switched off what was there before
            _activate(layer, active.get(layer, set()) | (_adapters(layer) & {self.name}))
        self._refuse_nested()
        self.done = True
        self._tell()

    def _put_in(self) -> Any:
        """Let PEFT wrap the layers; returns its tuner."""
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

        try:
            with warnings.catch_warnings():  # of a second adapter: meant here, and `_check` looks at what came of it
                warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
                return PEFT_TYPE_TO_TUNER_MAPPING[self.config.peft_type](self.model, self.config, self.name)
        except (ValueError, TypeError, RuntimeError, AttributeError) as error:
            kind = self.config.peft_type.value.lower()
            raise petune.AttachError(f"PEFT cannot put {kind} on {self.edit.sites.model}: {error}") from None

    def _tell(self) -> None:
        """What is to happen when the attachment is switched, merged, or on for some rows of a batch."""
        edit, config = self.edit, self.config
        by_rows = config.peft_type.value == "LORA" and not (
            config.use_dora or getattr(config, "target_parameters", None)
        )
        edit.on_toggle(self._switch, check=self._refuse_nested, rows=self._rows if by_rows else None)
        edit.on_merge(self._merge)

    def to_external(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's config and tensors by PEFT's keys; the tensors share memory with the model's.

        Raises:
            AttachError: PEFT leaves out some of what trains.
        """
        own = {id(t) for t in self._added_tensors()}
        tensors = self._chosen(own)
        mine = {t.data_ptr() for t in tensors.values()}
        lost = [p for p in self.added_parameters if p.data_ptr() not in mine]
        if lost:
            raise petune.AttachError(
                f"PEFT must save all that {self.config.peft_type.value} trains, but left out {len(lost)} of "
                f"{len(self.added_parameters)} tensors; nothing was written"
            )
        beside = {key: t.detach() for key, t in state.items() if id(t) not in own and t.data_ptr() not in mine}
        config = self.config.to_dict() | {"inference_mode": True}
        if not isinstance(config["target_modules"], str):
            config["target_modules"] = sorted(config["target_modules"])
        head = [*dict.fromkeys(key.rpartition(".")[0] for key in beside)]
        config["modules_to_save"] = head or None
        plain = {k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in config.items()}
        return plain, {**tensors, **{PREFIX + key: t for key, t in beside.items()}}

    def _refuse_shared(self) -> None:
        kind = self.config.peft_type
        there = [config.peft_type for config in getattr(self.model, "peft_config", {}).values()]
        if kind.value in SHARES and kind in there:
            raise petune.AttachError(
                f"one adapter of {kind.value.lower()} is possible on a model, since PEFT keeps with the first what all "
                "of them project by, but there is one already. Detach it first, or use lora"
            )

    def _check(self, wanted: list[str], before: dict[str, Any]) -> None:
        missed = [path for path in wanted if path not in self.layers]
        kinds = {name: config.peft_type for name, config in getattr(self.model, "peft_config", {}).items()}
        others = [
            path
            for path, layer in self.layers.items()
            if {kinds.get(n) for n in _adapters(layer)} != {kinds.get(self.name)}
        ]
        if missed or others or not self.layers:
            held = [path for path in (*others, *missed) if path in before]
            other = f"{held[0]} holds another PEFT type already" if held else "they are of a kind it does not know"
            raise petune.AttachError(
                f"PEFT must wrap the {len(wanted)} layers it is given, but left out "
                f"{', '.join((others or missed)[:3]) or 'all'}: {other}. {ONE_TYPE}"
            )
        classifier = self.edit.sites.parts.get("head")
        head = {id(inside) for module in (classifier.modules if classifier else ()) for inside in module.modules()}
        twice = [path for path, layer in self.layers.items() if {id(layer), id(layer.get_base_layer())} & head]
        if twice:
            raise petune.AttachError(
                f"the classifier trains as it is, but target_modules name {twice[0]}, its layer; leave it out"
            )
        called = self.edit.called(self.layers.values())
        dead = [path for path, layer in self.layers.items() if layer not in called]
        if dead:
            raise petune.AttachError(
                f"PEFT's layer would do nothing: the forward of {self.edit.sites.model} never calls {dead[0]}; its "
                "weight is read without calling it. Leave it out of target_modules"
            )

    def _bare(self, layer: Any) -> None:
        """Keep the owner of an attention from reading the weights past the layer, as long as it is enabled."""
        from petune.tuners.peft_bare import call_it, open_up

        open_up(layer)
        handles = [layer.register_forward_pre_hook(call_it)]

        def switch(on: bool) -> None:
            if on:
                handles.append(layer.register_forward_pre_hook(call_it))
            else:
                handles.pop().remove()

        self.edit.on_toggle(switch)

    def _adopt(self, modules: set[nn.Module], parameters: set[int], buffers: set[tuple[nn.Module, str]]) -> None:
        """Take over what was not there before; adapters of one type share the dictionaries of a layer's buffers."""
        from peft.tuners._buffer_dict import BufferDict

        new = [p for p in self.model.parameters() if id(p) not in parameters]
        layers = {layer for _, layer in _layers(self.model)}
        parts = [
            m for m in self.model.modules() if m not in modules and m not in layers and not isinstance(m, BufferDict)
        ]
        held = [(m, name) for m in self.model.modules() for name in m._buffers if (m, name) not in buffers]
        shared = [(layer, name) for layer in self.layers.values() for name in layer._buffers]  # BOFT's permutation
        self.added_parameters, self.added_buffers = new, list(dict.fromkeys([*held, *shared]))
        self.edit.add_parameters(new, buffers=self.added_buffers)
        self.add_modules(parts)

    def add_modules(self, modules: Iterable[nn.Module]) -> None:
        """Register modules that were put in by hand."""
        new = list(modules)
        self.added_modules += new
        self.edit.add_parameters([], new)

    def _added_tensors(self) -> list[Tensor]:
        single = [module._buffers.get(name) for module, name in self.added_buffers]
        buffers = [*(b for module in self.added_modules for b in module.buffers()), *single]
        return [*self.added_parameters, *(b for b in buffers if b is not None)]

    def _chosen(self, own: set[int]) -> dict[str, Tensor]:
        """What PEFT saves, of what is our own: it chooses by names, which other types may share."""
        from peft import get_peft_model_state_dict

        shell = nn.Module()  # what a PeftModel looks like, around the same tensors
        shell.base_model = self.tuner
        held = copy.copy(self.config)
        held.rank_pattern = None  # the layers have the ranks of AdaLoRA's already
        shell.peft_config = {self.name: held}  # type: ignore[assignment]
        others = {id(t) for t in (*self.model.parameters(), *self.model.buffers())} - own  # FRoD has some beside it
        saved = {id(t) for t in shell.state_dict(keep_vars=True).values()} - others
        named = (*shell.named_parameters(remove_duplicate=False), *shell.named_buffers(remove_duplicate=False))
        given = {key: t for key, t in named if id(t) in saved}
        tensors = get_peft_model_state_dict(shell, state_dict=given, adapter_name=self.name)
        return {self._own_key(key): t.detach() for key, t in tensors.items()}

    def _own_key(self, key: str) -> str:
        """A key as it was before another type's layer was put around one of these."""
        first = {layer: path for path, layer in self.layers.items()}
        for path, layer in _layers(self.model):
            if layer in first and key.startswith(f"{PREFIX}{path}."):
                return f"{PREFIX}{first[layer]}{key.removeprefix(PREFIX + path)}"
        return key

    def _refuse_nested(self) -> None:
        """Layers of two types around each other: one may read the weight past the other, so only one is on."""
        mine = set(self.layers.values())
        for path, outer in _layers(self.model):
            nested = list(_nested(outer))
            if mine & {*nested} and any(_active(layer) for layer in nested if layer not in mine):
                kind = self.config.peft_type.value.lower()
                raise petune.AttachError(
                    f"{kind} must be the only PEFT type that is on at a layer, but {path} has another that is on. "
                    f"{ONE_TYPE}, or switch the other off before"
                )

    def _switch(self, on: bool) -> None:
        for layer in self.layers.values():
            _activate(layer, _active(layer) | {self.name} if on else _active(layer) - {self.name})

    def _rows(self, rows: list[int] | None, batch_size: int) -> None:
        """PEFT's LoRA takes the adapter of every row of a batch as an argument: see that each layer gets it."""
        for layer in self.layers.values():
            table: dict[str, list[int]] = layer.__dict__.setdefault("petune_rows", {})
            if rows is not None:
                if not table:
                    layer.petune_hook = layer.register_forward_pre_hook(_tell_rows, with_kwargs=True)
                table[self.name] = rows
                layer.petune_batch_size = batch_size
            elif table.pop(self.name, None) is not None and not table:
                layer.petune_hook.remove()

    def _merge(self) -> None:
        for layer in self.layers.values():
            try:
                layer.merge(adapter_names=[self.name])
            except (NotImplementedError, AttributeError, TypeError, ValueError) as error:
                raise petune.NotMergeable(
                    f"PEFT cannot fold {self.config.peft_type.value} into weights: {error}"
                ) from None
            layer.merged_adapters.clear()  # for good: other adapters of the layer go on

    def _undo(self, had_config: bool, before: Mapping[Any, set[str]]) -> Callable[[], None]:
        held = [(m, list(m._parameters)) for m in self.model.modules() if isinstance(m, nn.MultiheadAttention)]

        def undo() -> None:
            active = {layer: _active(layer) for _, layer in _layers(self.model)} if self.done else before
            for path, layer in _layers(self.model):
                others = _adapters(layer) - {self.name}
                if others and self.name in _adapters(layer):
                    layer.delete_adapter(self.name)
                elif not others:
                    parent, _, attribute = path.rpartition(".")
                    setattr(self.model.get_submodule(parent), attribute, layer.base_layer)
            for _, layer in _layers(self.model):  # PEFT switches on or off what is left
                _activate(layer, set(active.get(layer, ())) - {self.name})
            for module, names in held:  # PEFT takes a bare weight out and puts it in again in every forward
                for name in names:
                    module._parameters[name] = module._parameters.pop(name)
            configs = getattr(self.model, "peft_config", {})
            configs.pop(self.name, None)
            if not configs and not had_config and hasattr(self.model, "peft_config"):
                del self.model.peft_config

        return undo


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(path, m) for path, m in model.named_modules() if isinstance(m, BaseTunerLayer)]


def _nested(layer: Any) -> Iterator[Any]:
    """A layer of PEFT's, and those of other types inside it."""
    while hasattr(layer, "base_layer"):
        yield layer
        layer = layer.base_layer


def _adapters(layer: Any) -> set[str]:
    held: list[Any] = [getattr(layer, name, None) for name in (*layer.adapter_layer_names, *layer.other_param_names)]
    return {key for part in held if hasattr(part, "keys") for key in part.keys()}  # noqa: SIM118 (not all iterate)


def _active(layer: Any) -> set[str]:
    return set() if layer._disable_adapters else set(layer.active_adapters)


def _activate(layer: Any, names: set[str]) -> None:
    layer._active_adapter = sorted(names)
    layer._disable_adapters = not names


def _fix_constants(layer: Any) -> None:
    """Constants that PEFT holds as parameters which do not train (AdaLoRA's ranknum) are buffers here."""
    for name in layer.other_param_names:
        held = getattr(layer, name, None)
        if isinstance(held, nn.ParameterDict):
            from peft.tuners._buffer_dict import BufferDict

            setattr(layer, name, BufferDict({key: p.detach() for key, p in held.items()}))


def _name_as_before(layer: Any) -> None:
    """The wrapped module's tensors keep their names in state_dict, in and out, though PEFT moved the module."""
    if not hasattr(layer, "is_named_as_before"):
        layer.is_named_as_before = True
        layer.register_state_dict_post_hook(_hide)
        layer.register_load_state_dict_pre_hook(_find)


def _hide(layer: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    inner = f"{prefix}base_layer."
    for key in [k for k in state if k.startswith(inner)]:
        state[prefix + key[len(inner) :]] = state.pop(key)


def _find(layer: Any, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    for name in layer.base_layer.state_dict():
        if prefix + name in state:
            state[f"{prefix}base_layer.{name}"] = state.pop(prefix + name)


def _tell_rows(layer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if len(args[0]) != layer.petune_batch_size:
        raise petune.AttachError(
            f"one batch of several tasks needs a row for each image in every layer, but there are {len(args[0])} for "
            f"{layer.petune_batch_size} images"
        )
    names = ["__base__"] * len(args[0])
    for name, rows in layer.petune_rows.items():
        for row in rows:
            names[row] = name
    return args, {**kwargs, "adapter_names": names}
