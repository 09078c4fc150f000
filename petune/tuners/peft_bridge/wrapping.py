"""Let PEFT wrap layers of a model; they are toggled, merged and detached as petune's own edits are."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn

import petune
from petune.tuners.peft_bridge.checks import (
    refuse_classifier,
    refuse_fewer_factors,
    refuse_left_out,
    refuse_other_parameters,
    refuse_together,
    refuse_uncalled,
)
from petune.tuners.peft_bridge.encoder_layer import fit_encoder_layers
from petune.tuners.peft_bridge.layer import (
    active_adapters,
    adapters_in,
    follow_dtype,
    keep_state_dict_names,
    make_constants_buffers,
    peft_layers,
    set_active,
    set_adapter_active,
)
from petune.tuners.peft_bridge.lora_addition import is_plain_lora, lora_addition
from petune.tuners.peft_bridge.nesting import OWN_LAYERS, hidden_layers
from petune.tuners.peft_bridge.parts import mask_of_rows
from petune.tuners.peft_bridge.shared_modules import put_in_all_places


class Snapshot:
    """State of a model before PEFT changes it."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = peft_layers(model)
        self.active = {layer: active_adapters(layer) for layer in self.layers.values()}
        self.modules = set(model.modules())
        self.parameters = {id(p) for p in model.parameters()}
        self.buffers = {(module, name) for module in self.modules for name in module._buffers}
        self.has_empty_config = getattr(model, "peft_config", None) == {}
        attentions = [m for m in self.modules if isinstance(m, nn.MultiheadAttention)]
        self.parameter_order = [(attention, list(attention._parameters)) for attention in attentions]


class WrappedLayers:
    """The layers that one attachment has wrapped.

    Attributes:
        edit: The attachment's edit.
        config: PEFT's config.
        rows: See `wrap_layers`.
        name: The adapter's name inside PEFT.
        before: The model before PEFT changed it.
        tuner: PEFT's tuner; None until PEFT has run.
        layers: PEFT's layers that hold the adapter, by path.
        added_parameters, added_modules, added_buffers: What came into the model.
    """

    def __init__(self, edit: petune.Edit, config: Any, rows: Mapping[str, list[tuple[int, int]]]) -> None:
        self.edit = edit
        self.rows = rows
        self.model = edit.model
        self.config = config
        self.name = f"petune_{edit.name}"  # PEFT removes it from keys, so it must not be a module's name
        self.before = Snapshot(edit.model)
        self.tuner: Any = None
        self.layers: dict[str, Any] = {}
        self.added_parameters: list[nn.Parameter] = []
        self.added_modules: list[nn.Module] = []
        self.added_buffers: list[tuple[nn.Module, str]] = []
        self._complete = False

    @property
    def kind(self) -> str:
        """PEFT's name of the type in lower case."""
        return str(self.config.peft_type.value.lower())

    def run_peft(self) -> None:
        """Let PEFT wrap the layers that its config names.

        Raises:
            AttachError: PEFT refuses.
        """
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

        refuse_other_parameters(self.model, self.config)
        nesting = hidden_layers(self.model) if self.kind in OWN_LAYERS else nullcontext()
        try:
            with warnings.catch_warnings(), nesting:
                # a second adapter is intended here, and `check` looks at the result
                warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
                if getattr(self.config, "target_parameters", None):  # it follows their patterns, but looks for modules
                    warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
                self.tuner = PEFT_TYPE_TO_TUNER_MAPPING[self.config.peft_type](self.model, self.config, self.name)
                self.tuner._cast_adapter_dtype(self.name)  # to float32, as PeftModel does
        except (ValueError, TypeError, RuntimeError, AttributeError) as error:
            names = getattr(self.config, "target_modules", None)
            is_pattern = isinstance(names, str) and "not found" in str(error)
            advice = f" PEFT reads a string as a pattern of whole paths. For names use a list, [{names}]"
            quantized = "" if is_pattern else _advice_if_quantized(self.model)
            raise petune.AttachError(
                f"PEFT cannot put {self.kind} on {self.edit.sites.model}{quantized}: "
                f"{error}{advice if is_pattern else ''}"
            ) from None
        self.layers = {
            path: layer for path, layer in peft_layers(self.model).items() if self.name in adapters_in(layer)
        }
        self._wrap_other_places()
        fit_encoder_layers(self.edit, self.layers.values())

    def _wrap_other_places(self) -> None:
        """Put the layers in all places of the modules that they wrap; PEFT has put them in the first place only."""
        before = set(self.before.layers.values())
        new = {path: layer for path, layer in self.layers.items() if layer not in before}
        shared = [p for p, layer in new.items() if put_in_all_places(self.model, layer.get_base_layer(), layer)]
        if shared:
            warnings.warn(
                f"{self.edit.sites.model} has {', '.join(shared[:3])} in several places: one adapter acts in all of "
                "them. PEFT itself would put it in the first place only, so load it with petune.load",
                stacklevel=2,
            )

    def check(self, wanted: list[str]) -> None:
        """See that PEFT has wrapped the layers at the paths `wanted`, and that all of them act."""
        refuse_left_out(self.model, self.layers, self.name, wanted, set(self.before.layers))
        refuse_classifier(self.edit.sites, self.layers)
        refuse_fewer_factors(self.layers, self.config, self.name)
        refuse_uncalled(self.edit, self.layers)

    def register(self) -> None:
        """Register all that PEFT has added as the attachment's own, under names that do not depend on PEFT."""
        for layer in self.layers.values():
            make_constants_buffers(layer)
            follow_dtype(layer)
        if self.kind == "adalora":
            self.config.inference_mode = True  # petune decides what trains; PEFT would allow only one on a model
            if self.config.rank_pattern:  # a trained adapter has fewer ranks
                self.tuner.resize_modules_by_rank_pattern(self.config.rank_pattern, self.name)
            for layer in self.layers.values():  # PEFT freezes a second adapter, and one that was loaded
                for factors in (layer.lora_A, layer.lora_B, layer.lora_E):
                    factors[self.name].requires_grad_(True)
        self._register_tensors()
        for layer in self.layers.values():
            keep_state_dict_names(layer)

    def add_modules(self, modules: Iterable[nn.Module]) -> None:
        """Register modules as the attachment's own."""
        new = list(modules)
        self.added_modules += new
        self.edit.add_parameters([], new)

    def activate(self) -> None:
        """Activate the adapter, and those that PEFT has deactivated on the way."""
        for layer in {**self.before.active, **dict.fromkeys(self.layers.values())}:
            own = {self.name} & adapters_in(layer)
            set_active(layer, self.before.active.get(layer, set()) | own)
        self._refuse_together()
        self._complete = True

    def register_callbacks(self) -> None:
        """Let the layers be toggled, merged and restricted to rows with the attachment."""
        layers = {layer: partial(set_adapter_active, layer, self.name) for layer in self.layers.values()}
        additions = {layer: lora_addition(layer, self.name) for layer in layers if is_plain_lora(layer, self.name)}
        self.edit.on_toggle(self._toggle, check=self._refuse_together, layers=layers, additions=additions)
        self.edit.on_merge(self._merge)

    def added_tensors(self) -> list[Tensor]:
        """Return all parameters and buffers that came into the model."""
        single = [module._buffers.get(name) for module, name in self.added_buffers]
        buffers = [*(b for module in self.added_modules for b in module.buffers()), *single]
        return [*self.added_parameters, *(b for b in buffers if b is not None)]

    def unwrap(self) -> None:
        """Take the layers out again; adapters of other attachments stay as they are."""
        # a failed attach restores what was active before; PEFT switches adapters on or off when one is taken out
        layers = peft_layers(self.model).values()
        active = {layer: active_adapters(layer) for layer in layers} if self._complete else self.before.active
        self._remove_layers()
        for layer in peft_layers(self.model).values():
            set_active(layer, set(active.get(layer, ())) - {self.name})
        for attention, names in self.before.parameter_order:  # PEFT takes a parameter out and in again in every forward
            for name in names:
                attention._parameters[name] = attention._parameters.pop(name)
        configs = getattr(self.model, "peft_config", {})
        configs.pop(self.name, None)
        if not configs and not self.before.has_empty_config and hasattr(self.model, "peft_config"):
            del self.model.peft_config

    def _remove_layers(self) -> None:
        for layer in peft_layers(self.model).values():
            others = adapters_in(layer) - {self.name}
            if others and self.name in adapters_in(layer):
                layer.delete_adapter(self.name)
            elif not others:
                put_in_all_places(self.model, layer, layer.base_layer)

    def _register_tensors(self) -> None:
        from peft.tuners._buffer_dict import BufferDict

        before, layers = self.before, set(peft_layers(self.model).values())
        modules = [m for m in self.model.modules() if m not in before.modules and m not in layers]
        buffers = [(m, name) for m in self.model.modules() for name in m._buffers if (m, name) not in before.buffers]
        # adapters of one type share the dictionaries of a layer's buffers; BOFT keeps a permutation in the layer
        buffers += [(layer, name) for layer in self.layers.values() for name in layer._buffers]
        self.added_parameters = [p for p in self.model.parameters() if id(p) not in before.parameters]
        self.added_buffers = list(dict.fromkeys(buffers))
        wrappers = self.layers.values()  # they use dropout by their own training flag; the layers inside are frozen
        own = {path.replace(".base_layer", ""): layer for path, layer in self.layers.items()}
        factors = {own[path].lora_B[self.name].weight: rows for path, rows in self.rows.items()}
        masks = {weight: mask_of_rows(weight, rows) for weight, rows in factors.items()}
        self.edit.add_parameters(self.added_parameters, buffers=self.added_buffers, wrappers=wrappers, masks=masks)
        self.add_modules(m for m in modules if not isinstance(m, BufferDict))

    def _refuse_together(self) -> None:
        refuse_together(self.model, self.kind, set(self.layers.values()), self.name)

    def _toggle(self, on: bool) -> None:
        for layer in self.layers.values():
            set_adapter_active(layer, self.name, on)

    def _merge(self) -> None:
        for layer in self.layers.values():
            try:
                layer.merge(adapter_names=[self.name])
            except (NotImplementedError, AttributeError, TypeError, ValueError) as error:
                raise petune.NotMergeable(f"PEFT cannot merge {self.kind} into weights: {error}") from None
            layer.merged_adapters.clear()  # merged for good: the layer's other adapters stay active


def wrap_layers(
    edit: petune.Edit, config: Any, wanted: list[str], rows: Mapping[str, list[tuple[int, int]]]
) -> WrappedLayers:
    """Let PEFT wrap the layers that its config names.

    Args:
        edit: The attachment's edit.
        config: PEFT's config.
        wanted: Paths that must be wrapped; empty if the user has named the targets.
        rows: By path of a layer of which only some outputs are to change, first and last of the rows of each part.

    Raises:
        AttachError: PEFT refuses, leaves out a layer, or would do nothing in one.
    """
    wrapped = WrappedLayers(edit, config, rows)
    edit.on_detach(wrapped.unwrap)
    wrapped.run_peft()
    wrapped.check(wanted)
    wrapped.register()
    wrapped.activate()
    wrapped.register_callbacks()
    return wrapped


def _advice_if_quantized(model: nn.Module) -> str:
    """Return what to do if PEFT refuses a model whose weights are tensors of a class of their own; empty for others."""
    own = (type(p).__name__ for p in model.parameters() if hasattr(p, "__tensor_flatten__"))
    kind = next(own, "")
    advice = "Use base_precision=auto, or another method, such as lora or adaptformer. PEFT's reason"
    return f", whose weights are quantized ({kind}). {advice}" if kind else ""
