"""petune's tuners as a PEFT type, `PETUNE`: `PeftModel.from_pretrained(model, path)` after `register_with_peft()`.

PEFT keeps its types in an enum and three tables; `register_with_peft` adds a member and an entry to each. The config is
petune's `adapter_config.json`, the model is a shell around `petune.attach`. An adapter of another backbone is refused,
as by `petune.load`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import InitVar, asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftType, mapping as peft_tables
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from petune.adapters.format import CONFIG_FILE, TENSOR_FILE, SavedAdapter
from petune.adapters.migrations import FORMAT, migrate
from petune.adapters.peft_format import OWN_TYPE
from petune.base.errors import PetuneError, UsageError
from petune.base.files import write_manifest
from petune.injector.attach import attach_tuner
from petune.injector.attachment import Attachment
from petune.injector.fits import check_fits
from petune.injector.fixed_parameters import SavedTraining
from petune.injector.load import fill
from petune.injector.registry import build_tuner, load_tuner
from petune.injector.renamed import with_current_keys
from petune.injector.saved_sites import sites_as_saved
from petune.sites.find import find_sites

PREFIX = "base_model.model."
NEEDED = ("_get_adapter_state_dict", "_remap_adapter_state_dict_for_load", "_remove_adapter_name_from_key")


def register_with_peft() -> None:
    """Let PEFT load, train, switch and save the adapters of petune's tuners. A second call does nothing.

    This adds the type `PETUNE` to PEFT's own tables, for the whole process.

    Raises:
        UsageError: The installed PEFT is too old.
    """
    if OWN_TYPE in PeftType.__members__:
        return
    if not all(hasattr(BaseTuner, name) for name in NEEDED):
        raise UsageError("PEFT loads petune's adapters from version 0.21 on. Upgrade it: pip install -U peft")
    member = str.__new__(PeftType, OWN_TYPE)
    member._name_ = OWN_TYPE
    member._value_ = OWN_TYPE
    type.__setattr__(PeftType, OWN_TYPE, member)
    PeftType._member_names_.append(OWN_TYPE)
    PeftType._member_map_[OWN_TYPE] = member
    PeftType._value2member_map_[OWN_TYPE] = member
    model_class: Any = PetuneModel
    peft_tables.PEFT_TYPE_TO_PREFIX_MAPPING[member] = PetuneModel.prefix
    peft_tables.PEFT_TYPE_TO_CONFIG_MAPPING[member] = PetuneConfig
    peft_tables.PEFT_TYPE_TO_TUNER_MAPPING[member] = model_class


@dataclass
class PetuneConfig(PeftConfig):
    """petune's `adapter_config.json` for PEFT. A new adapter needs `tuner` and `config` only.

    Attributes:
        tuner: The method's name, such as `adaptformer`.
        config: Its options.
        train_head: Train and save the classifier too.
        format: See `petune.adapters.migrations`; an older one is brought to the current one.
        distribution, version: The package of the method.
        geometry, backbone_dtype, fingerprint, head_fingerprint, addresses, reference_logits: The backbone, see
            `Attachment.describe`.
        chosen_sites: Blocks and heads that the user has chosen; None for all.
        left_fixed: Paths of parameters that the model's author had fixed, and that the method left; None for none.
        named_fingerprint, named_head_fingerprint: Those of a file up to format 3.
        metadata: Further plain data.
    """

    tuner: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    train_head: bool = True
    format: int = FORMAT
    distribution: str | None = None
    version: str | None = None
    geometry: dict[str, Any] | None = None
    chosen_sites: dict[str, Any] | None = None
    left_fixed: list[str] | None = None
    backbone_dtype: str | None = None
    fingerprint: str | None = None
    head_fingerprint: str | None = None
    named_fingerprint: str | None = None
    named_head_fingerprint: str | None = None
    addresses: dict[str, str] | None = None
    reference_logits: dict[str, Any] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    behaviour: InitVar[dict[str, Any] | None] = None  # a key of format 1

    def __post_init__(self, behaviour: dict[str, Any] | None) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = PeftType(OWN_TYPE)
        if self.format == FORMAT:
            return
        for key, value in migrate({**asdict(self), "behaviour": behaviour}).items():
            setattr(self, key, value)

    def saved_training(self) -> SavedTraining | None:
        """Return what an adapter that is loaded says about its training; None for a new one."""
        return None if self.geometry is None else SavedTraining.of_config(self.addresses or {}, self.left_fixed)

    @property
    def is_adaption_prompt(self) -> bool:
        """True: the method has no layers of PEFT's, so PEFT enables and disables it as a whole."""
        return True

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the config next to the tensors, which PEFT wrote before, and the manifest that petune checks."""
        super().save_pretrained(save_directory, **kwargs)
        path = Path(save_directory)
        write_manifest(path, [name for name in (CONFIG_FILE, TENSOR_FILE) if (path / name).is_file()])


class PetuneModel(BaseTuner):
    """The module that PEFT puts between its PeftModel and the backbone.

    Attributes:
        attachments: By PEFT's adapter name.
        training_names: The adapters that train; a classifier that several have trains if one of them does.
    """

    prefix = "petune_"

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        object.__setattr__(self, "attachments", {})  # before nn.Module's __init__, and never a submodule
        self.enabled = True
        self.training_names: set[str] = set()
        super().__init__(model, peft_config, adapter_name, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, **kwargs: Any) -> None:  # type: ignore[override]
        """Attach an adapter and disable the others, as PEFT does.

        Raises:
            UsageError: The method is PEFT's own, or the model has no values yet.
        """
        config = self.peft_config[adapter_name]
        family = config.tuner.partition(":")[0]
        if family in {"peft", "lora", "dora"} and load_tuner(family).__module__.startswith("petune."):
            raise UsageError(f"{config.tuner} is PEFT's own method. Use PEFT's config for it instead of PetuneConfig")
        if nn.Linear(1, 1).weight.is_meta:  # how PEFT's low_cpu_mem_usage takes effect
            raise UsageError("petune's tuners attach to a model with values. Leave out low_cpu_mem_usage")
        active_before = self.active_adapters if self.attachments else []
        self._activate([])
        try:
            tuner = build_tuner(config.tuner, **config.config)
            sites = None if self.attachments else sites_as_saved(model, config.geometry, config.chosen_sites or {})
            attachment = attach_tuner(
                model,
                tuner,
                sites=sites,
                name=adapter_name,
                train_head=config.train_head,
                find=lambda: find_sites(model),
                saved=config.saved_training(),
            )
        except BaseException:
            self.peft_config.pop(adapter_name, None)
            self._activate(active_before)
            raise
        self.attachments[adapter_name] = attachment
        if config.geometry is None:  # a new adapter; a saved one describes its backbone already
            for key, value in attachment.describe().items():
                setattr(config, key, value)
        self.active_adapter = adapter_name
        self.set_requires_grad(adapter_name, not config.inference_mode)

    def _freeze_others(self) -> None:
        """Freeze adapters that do not train: attaching, detaching and enabling one lets all that it has train."""
        names = self.training_names & self.attachments.keys()
        trained = {id(p) for name in names for p in self.attachments[name].parameters()}
        for attachment in self.attachments.values():
            for p in attachment.parameters():
                p.requires_grad_(id(p) in trained)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("PEFT calls this from its own inject_adapter, which is overridden here")

    def add_adapter(self, adapter_name: str, config: PetuneConfig) -> None:
        """Add an adapter; the active one stays active."""
        active_before = self.active_adapters
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        self._activate(active_before)

    def delete_adapter(self, adapter_name: str) -> None:
        """Detach an adapter. If it was active, the first of the others becomes active."""
        active_before = self.active_adapters
        self._activate([])
        self.attachments.pop(adapter_name).detach()
        self.training_names.discard(adapter_name)
        del self.peft_config[adapter_name]
        self._activate([name for name in active_before if name != adapter_name] or list(self.attachments)[:1])

    def unload(self) -> nn.Module:
        """Detach all adapters and return the backbone as it was, bit for bit."""
        self._activate([])
        for name in list(self.attachments):
            self.attachments.pop(name).detach()
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        model: nn.Module = self.model
        return model

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Return the backbone with one adapter folded in; see `Attachment.merge`. The others are removed.

        Args:
            progressbar, safe_merge: PEFT's, without effect: every merge is checked.
            adapter_names: A list with the name of the adapter; None for the active one.

        Raises:
            NotMergeable: The method is not a change of weights. Nothing has changed.
            UsageError: It is not exactly one adapter.
        """
        active_before = self.active_adapters
        names = adapter_names if adapter_names is not None else active_before if self.enabled else []
        if isinstance(names, str) or len(names) != 1 or names[0] not in self.attachments:
            raise UsageError(
                f"merge_and_unload merges exactly one adapter, not {names or 'none'}. Activate one by set_adapter, or "
                f"give adapter_names a list with one of {', '.join(self.attachments)}"
            )
        with self._temporarily_active(names[0]):
            self.attachments[names[0]].merge()
            del self.attachments[names[0]]
        return self.unload()

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate one adapter; it trains unless `inference_mode`."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if len(names) != 1:
            raise UsageError(
                f"one adapter of petune can be active here, not {names}. Use petune.AdapterBank for a mixed batch"
            )
        self.training_names = set() if inference_mode else set(names)
        self._activate(names)

    def enable_adapter_layers(self) -> None:
        """Let the active adapter take effect again."""
        self.enabled = True
        self._activate(self.active_adapters)

    def disable_adapter_layers(self) -> None:
        """Let the model compute what the backbone alone does, bit for bit."""
        active = self.active_adapters
        self._activate([])
        self.enabled = False
        self.active_adapter = active

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let adapters train, or freeze them."""
        names = {adapter_names} if isinstance(adapter_names, str) else {*adapter_names}
        self.training_names = self.training_names | names if requires_grad else self.training_names - names
        self._freeze_others()

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to merge: petune does not unmerge.

        Raises:
            UsageError: Always.
        """
        raise UsageError("petune folds an adapter in for good. Use merge_and_unload()")

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise UsageError("use petune.AdapterBank instead of adapter_names for a batch of several tasks")
        yield

    @contextmanager
    def _temporarily_active(self, adapter_name: str) -> Iterator[None]:
        active_before = self.active_adapters
        enabled_before = self.enabled
        self.enabled = True
        self._activate([adapter_name])
        try:
            yield
        finally:
            if adapter_name in self.attachments:
                self._activate(active_before)
            if not enabled_before:
                self.disable_adapter_layers()

    def _activate(self, names: list[str]) -> None:
        # disable all first: what a method trains in place is exchanged for the backbone's own in between
        for attachment in self.attachments.values():
            attachment.disable()
        for name in names if self.enabled else []:
            self.attachments[name].enable()
        self.active_adapter = names[0] if len(names) == 1 else names
        self._freeze_others()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Leave the adapters' dtype alone: petune has set it."""

    @classmethod
    def _get_adapter_state_dict(
        cls, model: Any, config: Any, adapter_name: str, state_dict: Mapping[str, Tensor], unwanted_adapter_names: Any
    ) -> dict[str, Tensor]:
        """Return the tensors by the file's keys, and put the reference logits into the config.

        They are not taken from `state_dict`: where an adapter trains the backbone's own tensors in place and is
        disabled, that has the values of another one.
        """
        shell: PetuneModel = model.base_model
        attachment = shell.attachments[adapter_name]
        with shell._temporarily_active(adapter_name):
            config.reference_logits = attachment.reference_logits()
            return {key: tensor.detach().clone() for key, tensor in attachment.file_state().items()}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Check the tensors and fill them in, and return them by the model's keys.

        Raises:
            BackboneMismatch, CheckpointError: See `petune.load`. The adapter is removed again.
        """
        shell: PetuneModel = model.base_model
        attachment: Attachment = shell.attachments[adapter_name]
        saved = SavedAdapter(Path(f"the adapter {adapter_name}"), asdict(config), state_dict)
        saved = with_current_keys(attachment, saved)
        try:
            check_fits(attachment, saved)
            with shell._temporarily_active(adapter_name):
                fill(attachment, saved)
        except PetuneError:
            shell.delete_adapter(adapter_name)
            raise
        keys = zip(attachment.file_state(), attachment.state(), strict=True)
        return {PREFIX + in_model: saved.tensors[in_file] for in_file, in_model in keys}
