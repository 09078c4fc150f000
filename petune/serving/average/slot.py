"""A backbone with one adapter on it, whose values are exchanged for those of others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from petune.adapters.card import model_card
from petune.adapters.format import SavedAdapter, write_adapter
from petune.adapters.lora_products import LAYER_OPTIONS, RANK_OPTIONS
from petune.base.config import expand_home
from petune.base.errors import AttachError
from petune.injector.attach import attach
from petune.injector.attachment import Attachment
from petune.injector.load import start_from
from petune.injector.registry import build_tuner
from petune.injector.saved_sites import saved_sites
from petune.sites.forward import forget_caches

Part = Literal["tuned", "head", "buffer"]


class AdapterSlot:
    """An attachment whose values are exchanged.

    Args:
        attachment: The adapter that is on the model.
        saved: The adapter as saved.

    Attributes:
        attachment: What is on the model now.
    """

    def __init__(self, attachment: Attachment, saved: SavedAdapter) -> None:
        self.attachment = attachment
        self._saved = saved

    def values_of(self, saved: SavedAdapter, *, with_head: bool = True) -> dict[str, Tensor]:
        """Load an adapter and return its tensors by the file's keys, on the CPU.

        Args:
            saved: Of the same method, on the same backbone. A LoRA of another rank or other layers is attached first.
            with_head: With its classifier; without it, the classifier's tensors are left out.

        Raises:
            BackboneMismatch: It does not fit, or computes something else than when it was saved.
        """
        options, attached = saved.config["config"], self.attachment.tuner.config.plain()
        if any(options.get(key) != attached.get(key) for key in RANK_OPTIONS | LAYER_OPTIONS):
            self.exchange(options)
        start_from(self.attachment, saved, with_head=with_head)
        parts = self.parts()
        state = self.attachment.file_state()
        return {key: _copy(tensor) for key, tensor in state.items() if with_head or not parts[key][1]}

    def parts(self) -> dict[str, tuple[Part, bool]]:
        """Return for each of the file's keys what it is, and True if it is of the classifier."""
        attachment = self.attachment
        modules = attachment.tensors.head_modules if attachment.head else ()
        in_head = {_memory(t) for m in modules for t in (*m.parameters(), *m.buffers())}
        tuned, head = ({_memory(p) for p in group.values()} for group in (attachment.tuned, attachment.head))
        kinds: dict[str, tuple[Part, bool]] = {}
        for key, tensor in attachment.file_state().items():
            memory = _memory(tensor)
            kind: Part = "tuned" if memory in tuned else "head" if memory in head else "buffer"
            kinds[key] = kind, memory in in_head or memory in head
        return kinds

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor]) -> None:
        """Give the adapter on the model other values, by the file's keys.

        Raises:
            AttachError: One has another shape.
        """
        self.attachment.tensors.shape_buffers(values)
        for key, target in self.attachment.file_state().items():
            if key in values:
                if values[key].shape != target.shape:  # copy_ would repeat a value of one row or column
                    raise AttachError(
                        f"{key} is {tuple(values[key].shape)}, and the adapter has {tuple(target.shape)} there. Please "
                        "report this: petune should have refused these adapters"
                    )
                target.copy_(values[key])
        forget_caches(self.attachment.model)

    def exchange(self, options: Mapping[str, Any]) -> None:
        """Put an adapter of the same method with other options on the model, with the values it starts with."""
        model, name, is_training = self.attachment.model, self.attachment.name, self.attachment.model.training
        self.attachment.detach()
        config = self._saved.config
        tuner = build_tuner(config["tuner"], **options)
        sites = saved_sites(model, self._saved, None)
        self.attachment = attach(model, tuner, name=name, train_head=config["train_head"], sites=sites)
        model.train(is_training)

    def start_values(self, options: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
        """Return the tuned values that an adapter of these options starts with, as `petune run` draws them.

        Args:
            options: Of the method.
            seed: Of the run.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.exchange(options)
        parts, state = self.parts(), self.attachment.file_state()
        return {key: _copy(tensor) for key, tensor in state.items() if parts[key][0] == "tuned"}

    def save(self, path: str, metadata: Mapping[str, Any], *, with_head: bool) -> None:
        """Write the adapter that is on the model, with the logits that it computes.

        Args:
            path: The directory.
            metadata: See `Attachment.save`.
            with_head: Without its classifier, the directory has no reference logits and fits a model with any one.
        """
        attachment = self.attachment
        if with_head:
            attachment.save(path, metadata=metadata)
            return
        config = {**attachment.describe(), "train_head": False, "reference_logits": None, "metadata": dict(metadata)}
        parts = self.parts()
        tensors = {key: t for key, t in attachment.file_state().items() if not parts[key][1]}
        config["addresses"] = {key: value for key, value in config["addresses"].items() if key in tensors}
        external = attachment.tuner.to_external(attachment.state())
        peft_config = None if external is None else {**external[0], "modules_to_save": None}
        card = model_card(config, attachment.counts, is_peft=external is not None)
        write_adapter(expand_home(path), config, tensors, card, peft_config)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _memory(tensor: Tensor) -> int:
    """Return what identifies a tensor, also behind the views of it that PEFT returns."""
    return tensor.untyped_storage().data_ptr()
