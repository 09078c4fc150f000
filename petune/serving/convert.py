"""Convert an adapter to LoRA in PEFT's format: the change of each linear layer's weight, factored by an SVD.

That is possible where all that a method does is a change of weights and biases of linear layers: LoRA, DoRA, FacT,
RepAdapter, IA3, OFT, and any other adapter that merges. PEFT loads the result without petune.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from petune.adapters.format import SPLIT_OPTIONS, TENSOR_FILE, SavedAdapter, read_adapter
from petune.adapters.lora_products import Factors, check_rank, factored
from petune.base.arguments import PathText, check_arguments
from petune.base.config import expand_home
from petune.base.errors import NotMergeable, UnknownName
from petune.injector.attach import attach
from petune.injector.attachment import Attachment
from petune.injector.load import attach_saved
from petune.injector.merge import MAX_CHANGE, MAX_CHANGE_IN_HALF
from petune.runner.continued import tensors_digest
from petune.runner.run_adapter import find_adapter, read_run_adapter, run_dir_of
from petune.runner.split_options import read_split_options
from petune.serving.average.ingredients import check_finite
from petune.serving.average.record import OF_ONE_RUN, method_text
from petune.serving.average.request import check_new
from petune.serving.restore import rebuild_backbone
from petune.sites.forward import forget_caches
from petune.sites.logits import max_difference, max_value, synthetic_logits
from petune.sites.unsuitable import quantized_kind

FORMATS = ("peft-lora",)


@dataclass(frozen=True)
class Converted:
    """Summary of a conversion.

    Attributes:
        output: The adapter directory.
        method: What was converted.
        rank: Of the LoRA.
        errors: For each layer what the rank leaves out, relative to the Frobenius norm of the change of its weight.
        max_abs_diff: Largest difference between the logits of both adapters for two synthetic images.
        largest_logit: The largest of those logits.
        bytes: Size of the tensors.
    """

    output: str
    method: str
    rank: int
    errors: Mapping[str, float] = field(default_factory=dict)
    max_abs_diff: float = 0.0
    largest_logit: float = 0.0
    bytes: int = 0

    @property
    def largest_error(self) -> float:
        """The largest of the errors."""
        return max(self.errors.values(), default=0.0)


def convert(
    path: str | Path,
    output: str | Path,
    *,
    to: str = "peft-lora",
    rank: int | None = None,
    model: nn.Module | None = None,
    weights: str | None = None,
    trust_remote_code: bool = False,
) -> Converted:
    """Convert an adapter to PEFT's LoRA: `petune.convert("runs/fact", "lora")`.

    Args:
        path: A run or adapter directory.
        output: The adapter directory to create; `PeftModel.from_pretrained` and `petune.load` read it.
        to: The format, `peft-lora`.
        rank: Of the LoRA, in every layer. None takes the exact one, which is the smallest that leaves nothing out.
        model: The backbone, for an adapter that does not record how it is built. It is left as it is.
        weights: Where the backbone's weights are now; None takes them from where the run did.
        trust_remote_code: Allow a backbone that is built by the function `package.module:factory`.

    Raises:
        NotMergeable: The method is no change of weights of linear layers; the message says why. Nothing is written.
        UsageError: `output` exists, or `rank` is below 1.
        CheckpointError: The adapter is missing, damaged or of another backbone, or the result cannot be written.
        PetuneError: See `petune.Predictor`.
    """
    return _converted(path, output, to, rank, model, weights, trust_remote_code, is_written=True)


def preview_convert(
    path: str | Path,
    output: str | Path,
    *,
    to: str = "peft-lora",
    rank: int | None = None,
    weights: str | None = None,
    trust_remote_code: bool = False,
) -> Converted:
    """Do all of `convert` but write nothing; arguments and errors are the same."""
    return _converted(path, output, to, rank, None, weights, trust_remote_code, is_written=False)


def _converted(
    path: str | Path,
    output: str | Path,
    to: str,
    rank: int | None,
    model: nn.Module | None,
    weights: str | None,
    trust_remote_code: bool,
    *,
    is_written: bool,
) -> Converted:
    check_arguments(
        "petune.convert",
        path=(path, PathText),
        output=(output, PathText),
        to=(to, str),
        rank=(rank, int | None),
        model=(model, nn.Module | None),
        weights=(weights, str | None),
        trust_remote_code=(trust_remote_code, bool),
    )
    if to not in FORMATS:
        raise UnknownName("format", to, FORMATS)
    target = expand_home(output)
    check_new(target)
    check_rank(rank)
    if model is None:
        saved = check_finite(read_run_adapter(expand_home(path)))
        plain = rebuild_backbone(saved, weights, trust_remote_code=trust_remote_code).model
    else:
        saved, plain = check_finite(read_adapter(find_adapter(expand_home(path)))), copy.deepcopy(model)
    return _Conversion(saved, plain).convert(str(path), target, rank, is_written=is_written)


class _Conversion:
    """The change of weights that an adapter is, on its backbone.

    Args:
        saved: The adapter.
        plain: Its backbone, with nothing attached; its head is replaced.
    """

    def __init__(self, saved: SavedAdapter, plain: nn.Module) -> None:
        if kind := quantized_kind(plain):
            raise NotMergeable(
                f"the weights of the backbone are quantized ({kind}), and a change of them cannot be read off. Convert "
                "an adapter of a backbone in full precision"
            )
        self.saved = saved
        self.plain = plain
        tuned = copy.deepcopy(plain)
        attachment = attach_saved(tuned, saved)
        self.logits = synthetic_logits(tuned, attachment.sites)
        self.head = {key: t.detach().clone() for key, t in self._head_state(attachment).items()}
        before = {key: t.double() for key, t in plain.state_dict().items() if t.is_floating_point()}
        tuned.double()  # so that the difference of the weights is not lost in rounding
        attachment.merge()
        after = {key: t for key, t in tuned.state_dict().items() if key in before}
        self.changes = {key: after[key] - t for key, t in before.items() if not torch.equal(after[key], t)}
        for key in self._head_state(attachment):
            self.changes.pop(key, None)

    @staticmethod
    def _head_state(attachment: Attachment) -> dict[str, Tensor]:
        """Return the tensors of a classifier that trains, by state_dict key."""
        if not attachment.tensors.head:
            return {}
        head = attachment.sites.head
        owners = [] if head is None else head.named_modules
        return {f"{path}.{key}": t for path, module in owners for key, t in module.state_dict().items()}

    def layers(self) -> list[str]:
        """Return the linear layers that change, in the order of the model.

        Raises:
            NotMergeable: Something else changes, too.
        """
        linear = {path for path, module in self.plain.named_modules() if type(module) is nn.Linear}
        others = [key for key in self.changes if key.rpartition(".")[0] not in linear]
        if others:
            raise NotMergeable(
                f"{self.saved.config['tuner']} changes {others[0]}, which is not the weight or bias of an nn.Linear, "
                f"so LoRA cannot represent it ({len(others)} such tensors). Use petune.load, or petune export"
            )
        changed = {key.rpartition(".")[0] for key in self.changes}
        found = [path for path in linear if path in changed]
        if not found:
            raise NotMergeable(
                f"{self.saved.config['tuner']} changes no weight of the backbone, so there is nothing to convert. Use "
                "petune.load"
            )
        return sorted(found, key=[*dict(self.plain.named_modules())].index)

    def convert(self, path: str, output: Path, rank: int | None, *, is_written: bool) -> Converted:
        """Put the LoRA on the backbone, measure what it computes, and write it.

        Args:
            path: The adapter, as given.
            output: The directory.
            rank: See `convert`.
            is_written: False writes nothing.
        """
        layers = self.layers()
        weights = {
            layer: self.changes.get(f"{layer}.weight", torch.zeros_like(self._weight(layer)).double())
            for layer in layers
        }
        factors, errors = factored(weights, rank)
        chosen = next(iter(factors.values())).a_RI.shape[0]
        options = {"target_modules": layers, "r": chosen, "lora_alpha": chosen}
        if any(f"{layer}.bias" in self.changes for layer in layers):
            options["lora_bias"] = True
        attachment = self._attach(options)
        self._fill(attachment, factors)
        difference = max_difference(synthetic_logits(self.plain, attachment.sites), self.logits)
        method = str(self.saved.config["metadata"].get("method", self.saved.config["tuner"]))
        done = Converted(str(output), method, chosen, errors, difference, max_value(self.logits))
        limit = MAX_CHANGE if self.logits.dtype in {torch.float32, torch.float64} else MAX_CHANGE_IN_HALF
        if rank is None and not difference <= limit * done.largest_logit:
            raise NotMergeable(
                f"the exact LoRA of {method} computes something else: its logits differ by {difference:.2g}. The model "
                "may read these weights elsewhere, too. Use petune.load"
            )
        if not is_written:
            return done
        attachment.save(output, metadata=self._metadata(path, done, options))
        return Converted(**{**vars(done), "bytes": (output / TENSOR_FILE).stat().st_size})

    def _weight(self, layer: str) -> Tensor:
        weight = self.plain.get_submodule(layer).weight
        assert isinstance(weight, Tensor)
        return weight

    def _attach(self, options: Mapping[str, Any]) -> Attachment:
        """Attach a LoRA with these options to the backbone."""
        return attach(self.plain, "lora", train_head=bool(self.head), **options)

    @torch.no_grad()
    def _fill(self, attachment: Attachment, factors: Mapping[str, Factors]) -> None:
        """Copy factors, changes of biases, and the classifier."""
        state = attachment.file_state()
        for layer, parts in factors.items():
            start = f"base_model.model.{layer}."
            state[f"{start}lora_A.weight"].copy_(parts.a_RI)
            state[f"{start}lora_B.weight"].copy_(parts.b_OR)
            if f"{layer}.bias" in self.changes:
                state[f"{start}lora_B.bias"].copy_(self.changes[f"{layer}.bias"])
        for key, tensor in self._head_state(attachment).items():
            tensor.copy_(self.head[key])
        forget_caches(self.plain)

    def _metadata(self, path: str, done: Converted, options: Mapping[str, Any]) -> dict[str, Any]:
        metadata = self.saved.config["metadata"]
        kept = {key: v for key, v in metadata.items() if key not in OF_ONE_RUN or key == "images"}
        if (splits := read_split_options(metadata, run_dir_of(self.saved.path, metadata))) is not None:
            kept[SPLIT_OPTIONS] = splits
        if "final_fit" in (metadata.get("training") or {}):
            kept["training"] = {"val_metrics": None, "final_fit": "train+val"}
        kept["method"] = method_text("lora", options)
        kept["converted_from"] = {
            "path": path,
            "sha256": tensors_digest(self.saved),
            "method": done.method,
            "rank": done.rank,
            "largest_error": done.largest_error,
            "max_abs_diff": done.max_abs_diff,
        }
        return kept
