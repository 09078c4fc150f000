"""petune's tuners as a PEFT type, `PETUNE`: `PeftModel.from_pretrained(model, path)` after `register_with_peft()`.

PEFT keeps its types in an enum and three tables; `register_with_peft` adds a member and an entry to each. The config is
petune's `adapter_config.json`, the model is a shell around `petune.attach`. An adapter of another backbone is refused,
as by `petune.load`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from petune.base.errors import PetuneError, UsageError

if TYPE_CHECKING:
    from petune.injector.attachment import Attachment

PREFIX = "base_model.model."


@dataclass
class PetuneConfig(PeftConfig):
    """petune's `adapter_config.json` as PEFT sees it; to begin a new adapter, `tuner` and `config` suffice.

    Attributes:
        tuner: The method's name: `adaptformer`.
        config: Its options.
        train_head: Whether the classifier trains, and is saved, too.
        format, distribution, version, geometry, fingerprint, head_fingerprint, behaviour, metadata: See `petune.state`.
    """

    tuner: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    train_head: bool = True
    format: int = 1
    distribution: str | None = None
    version: str | None = None
    geometry: dict[str, Any] | None = None
    fingerprint: str | None = None
    head_fingerprint: str | None = None
    behaviour: dict[str, Any] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from peft import PeftType

        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = PeftType("PETUNE")

    @property
    def is_adaption_prompt(self) -> bool:
        """PEFT's question whether a method has no layers of PEFT's, so that it is switched as a whole."""
        return True

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the config beside the tensors, which PEFT has written by now, and the manifest that petune checks."""
        from petune.base.files import write_manifest
        from petune.injector.load import CONFIG_FILE, TENSOR_FILE

        super().save_pretrained(save_directory, **kwargs)
        place = Path(save_directory)
        write_manifest(place, [name for name in (CONFIG_FILE, TENSOR_FILE) if (place / name).is_file()])


class PetuneModel(BaseTuner):
    """What PEFT puts between its PeftModel and the backbone.

    Attributes:
        attachments: By PEFT's adapter name.
    """

    prefix = "petune_"

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        object.__setattr__(self, "attachments", {})  # before nn.Module's __init__, and never a submodule
        self.enabled = True
        super().__init__(model, peft_config, adapter_name, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, **kwargs: Any) -> None:  # type: ignore[override]
        """Attach; the adapters that are there already are switched off, as PEFT does."""
        from petune.injector.attach import attach
        from petune.injector.load import describe
        from petune.injector.registry import build_tuner, load_tuner

        config = self.peft_config[adapter_name]
        family = config.tuner.partition(":")[0]
        if family in {"peft", "lora", "dora"} and load_tuner(family).__module__.startswith("petune."):
            raise UsageError(f"{config.tuner} is PEFT's own; use its config instead of PetuneConfig")
        if nn.Linear(1, 1).weight.is_meta:  # how PEFT's low_cpu_mem_usage takes effect
            raise UsageError("petune's tuners are attached to a model that has values; leave out low_cpu_mem_usage")
        before = self.active_adapters if self.attachments else []
        self._activate([])
        try:
            tuner = build_tuner(config.tuner, **config.config)
            attachment = attach(model, tuner, name=adapter_name, train_head=config.train_head)
        except BaseException:
            self.peft_config.pop(adapter_name, None)
            self._activate(before)
            raise
        self.attachments[adapter_name] = attachment
        if config.geometry is None:  # a new one: which backbone it belongs to; a file says so already
            for key, value in describe(attachment).items():
                setattr(config, key, value)
        self._keep_frozen()
        self.active_adapter = adapter_name

    def _keep_frozen(self) -> None:
        """What was loaded for inference does not train, whatever came or went."""
        for name in self.attachments:
            if self.peft_config[name].inference_mode:
                self.set_requires_grad(name, False)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("petune puts adapters in by its own verbs, see inject_adapter")

    def add_adapter(self, adapter_name: str, config: PetuneConfig) -> None:
        """A further adapter; the one that was active stays so."""
        before = self.active_adapters
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        self._activate(before)

    def delete_adapter(self, adapter_name: str) -> None:
        """Detach it; the first of the others becomes active, where it was."""
        was_active = self.active_adapters
        self._activate([])
        self.attachments.pop(adapter_name).detach()
        del self.peft_config[adapter_name]
        left = [name for name in was_active if name != adapter_name] or list(self.attachments)[:1]
        self._activate(left)
        self._keep_frozen()

    def unload(self) -> nn.Module:
        """The backbone as it was, to the bit."""
        self._activate([])
        for name in [*self.attachments]:
            self.attachments.pop(name).detach()
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        model: nn.Module = self.model
        return model

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The backbone with the active adapter folded in; see `Attachment.merge`.

        Raises:
            NotMergeable: The method is no change of weights; nothing was changed.
        """
        active = self.active_adapters
        if len(active) != 1 or not self.enabled:
            raise UsageError(f"exactly one adapter must be active to be folded in, but {active or 'none'} is")
        for name in [name for name in self.attachments if name not in active]:
            self.delete_adapter(name)
        self.attachments[active[0]].merge()
        self.attachments.pop(active[0])
        return self.unload()

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Switch to one adapter; it trains unless `inference_mode`."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if len(names) != 1:
            raise UsageError(
                f"one adapter of petune can be active here, not {names}; see petune.AdapterBank for a mixed batch"
            )
        self._activate(names)
        self.set_requires_grad(list(self.attachments), False)
        self.set_requires_grad(names, not inference_mode)

    def enable_adapter_layers(self) -> None:
        """The active adapter takes effect again."""
        self.enabled = True
        self._activate(self.active_adapters)

    def disable_adapter_layers(self) -> None:
        """The backbone alone, to the bit."""
        active = self.active_adapters
        self._activate([])
        self.enabled, self.active_adapter = False, active

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Whether the adapters train."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in names:
            for p in self.attachments[name].parameters():
                p.requires_grad_(requires_grad)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not here: what is folded in stays.

        Raises:
            UsageError: Always.
        """
        raise UsageError("petune folds an adapter in for good; call merge_and_unload()")

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise UsageError("petune mixes tasks in one batch by petune.AdapterBank, not by adapter_names")
        yield

    @contextmanager
    def _temporarily_active(self, adapter_name: str) -> Iterator[None]:
        before, enabled = self.active_adapters, self.enabled
        self.enabled = True
        self._activate([adapter_name])
        try:
            yield
        finally:
            if adapter_name in self.attachments:
                self._activate(before)
            if not enabled:
                self.disable_adapter_layers()

    def _activate(self, names: list[str]) -> None:
        # one at a time: what a method trains in place is exchanged for the backbone's own in between
        for attachment in self.attachments.values():
            attachment.disable()
        for name in names if self.enabled else []:
            self.attachments[name].enable()
        self.active_adapter = names[0] if len(names) == 1 else names

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Adapters have their dtype from petune."""

    @classmethod
    def _get_adapter_state_dict(
        cls, model: Any, config: Any, adapter_name: str, state_dict: Mapping[str, Tensor], unwanted_adapter_names: Any
    ) -> dict[str, Tensor]:
        """The tensors by the keys of petune's file: not out of `state_dict`, which has another adapter's where one that
        trains the backbone's own values is switched off. And what the adapter computes now, for the config."""
        from petune.adapters.reference_logits import behaviour

        shell: PetuneModel = model.base_model
        with shell._temporarily_active(adapter_name):
            config.behaviour = behaviour(shell.attachments[adapter_name])
            return {key: tensor.detach().clone() for (key, tensor), _ in _keys(shell.attachments[adapter_name])}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """petune's checks, for which the tensors are filled in already, then the file's tensors by the model's keys.

        Raises:
            BackboneMismatch, CheckpointError: See `petune.load`; the adapter is taken off again.
        """
        from dataclasses import asdict

        from petune.injector.load import check_fits, fill

        shell: PetuneModel = model.base_model
        attachment, said, place = shell.attachments[adapter_name], asdict(config), Path(f"the adapter {adapter_name}")
        try:
            check_fits(attachment, said, state_dict, place)
            with shell._temporarily_active(adapter_name):
                fill(attachment, said, state_dict, place)
        except PetuneError:
            shell.delete_adapter(adapter_name)
            raise
        return {PREFIX + ours: state_dict[key] for (key, _), ours in _keys(attachment)}


def _keys(attachment: Attachment) -> Iterator[tuple[tuple[str, Tensor], str]]:
    """The file's keys and tensors, and the model's keys."""
    from petune.injector.load import file_tensors

    return zip(file_tensors(attachment).items(), attachment.state(), strict=True)


def register_with_peft() -> None:
    """Let PEFT load, train, switch and save the adapters of petune's tuners. A second call does nothing.

    This adds the type `PETUNE` to PEFT's own tables, for the whole process.

    Raises:
        UsageError: The installed PEFT is too old.
    """
    from peft import PeftType, mapping as known

    if "PETUNE" in PeftType.__members__:
        return
    needed = ("_get_adapter_state_dict", "_remap_adapter_state_dict_for_load", "_remove_adapter_name_from_key")
    if not all(hasattr(BaseTuner, name) for name in needed):
        raise UsageError("PEFT loads petune's adapters from version 0.21 on. Upgrade it: pip install -U peft")
    member = str.__new__(PeftType, "PETUNE")
    member._name_, member._value_ = "PETUNE", "PETUNE"
    type.__setattr__(PeftType, "PETUNE", member)
    PeftType._member_names_.append("PETUNE")
    PeftType._member_map_["PETUNE"] = PeftType._value2member_map_["PETUNE"] = member
    known.PEFT_TYPE_TO_PREFIX_MAPPING[member] = PetuneModel.prefix
    known.PEFT_TYPE_TO_CONFIG_MAPPING[member] = PetuneConfig
    model: Any = PetuneModel
    known.PEFT_TYPE_TO_TUNER_MAPPING[member] = model
