"""Options of PEFT's types: those of PEFT's own configs, without the ones that cannot apply here."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

import petune

REFUSED = {
    "lily": "its router averages over the batch, so the logits of an image depend on the other images",
    "xlora": "it mixes adapters that already exist",
    "poly": "it needs the task of every image",
    "trainable_tokens": "it trains word embeddings",
    "shadow": "it needs a language model",
    "cartridge": "it needs a language model",
    "prompt_tuning": "it puts prompts before word embeddings; use vpt",
    "multitask_prompt_tuning": "it puts prompts before word embeddings; use vpt",
    "p_tuning": "it puts prompts before word embeddings; use vpt",
    "cpt": "it puts prompts before word embeddings; use vpt",
    "prefix_tuning": "it puts prefixes into a language model's cache of keys and values; use vpt",
    "petune": "it stands for petune's own methods; name one of them",
    "adaption_prompt": "it only supports the attentions of three language models; use vpt",
}
"""PEFT types that cannot be a petune method, and why."""

NEED_TARGETS = ("layers_to_transform", "layers_pattern")
NOT_ACCEPTED = {
    "modules_to_save": "the classifier trains anyway; attach partial or norm as well to train more",
    "inference_mode": "an attached method trains",
    "task_type": "the task is to classify images",
    "sample_at_inference": "the logits of an image would be random in eval mode",
    "alora_invocation_tokens": "it waits for word tokens, which images have none of, so the adapter would do nothing",
    "trainable_token_indices": "it trains word embeddings",
    "save_only_topk_weights": "the file must hold everything that trains",
    **dict.fromkeys(NEED_TARGETS, "PEFT only reads it together with target_modules"),
}
PARTS = ("qkv", "q", "k", "v", "q,k", "q,v", "k,v")
"""Values of `targets` that are a part of an attention."""
IDENTITY_STARTS = (True, False, "gaussian", "orthogonal")
"""Values of `init_lora_weights` that leave the backbone's weights as they are."""


def _joined(targets: object) -> object:
    """Return a list such as [q, v] as text; other values as they are."""
    if isinstance(targets, list | tuple) and all(isinstance(name, str) for name in targets):
        targets = ",".join(targets)
    return targets.replace(" ", "") if isinstance(targets, str) else targets


class PeftConfig(petune.TunerConfig):
    """Options of a PEFT type. All options of PEFT's own config are accepted too, such as `r` and `lora_alpha`.

    Attributes:
        type: PEFT's name of the type in lower case: `lora`, `ia3`, `oft`, …
        targets: The linear layers of every block that are wrapped: those of the attention, of the MLP, or both; or of
            the attention those that make queries, keys and values (`qkv`), or some of these, as `[q,v]`. LoRA changes
            only the rows of these where one layer makes all three. PEFT's `target_modules` names layers instead.
    """

    model_config = ConfigDict(extra="allow")

    type: str = ""  # an empty one is refused with a list of all
    targets: Annotated[Literal["attn", "mlp", "all", *PARTS], BeforeValidator(_joined)] = "all"  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _check(self) -> Self:
        config_class = _config_class(self.type)
        _check_names(self.type, config_class, self.peft_options)
        _check_values(self.type, self.peft_options)
        if self.targets != "all" and "target_modules" in self.peft_options:
            raise petune.ConfigError(
                f"targets={self.targets} and target_modules both choose the layers. Leave one of them out"
            )
        try:
            config_class(**completed(self.type, self.peft_options))
        except (ValueError, TypeError) as error:
            raise petune.ConfigError(f"these options are refused by PEFT's {config_class.__name__}: {error}") from None
        return self

    @property
    def peft_options(self) -> dict[str, Any]:
        """The options for PEFT's config."""
        return dict(self.model_extra or {})


class LoraConfig(PeftConfig):
    """Options of LoRA. All further options of PEFT's LoraConfig are accepted too.

    Attributes:
        r: Rank.
        lora_alpha: α; the change is scaled by α/r. The default of r makes that 1.
        lora_dropout: Dropout on the input of A.
    """

    type: str = "lora"
    r: int = Field(8, ge=1)
    lora_alpha: float = Field(8, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)

    @property
    def peft_options(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("r", "lora_alpha", "lora_dropout")}
        return {**own, **super().peft_options}


class DoraConfig(LoraConfig):
    """Options of DoRA: those of LoRA.

    Attributes:
        use_dora: Always true; it makes PEFT's LoRA a DoRA.
    """

    use_dora: Literal[True] = True

    @property
    def peft_options(self) -> dict[str, Any]:
        return {**super().peft_options, "use_dora": True}


def peft_types() -> dict[str, Any]:
    """Return PEFT's config classes by type in lower case, without the types that are refused."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    types: Iterable[Any] = PEFT_TYPE_TO_TUNER_MAPPING
    configs = {kind.value.lower(): PEFT_TYPE_TO_CONFIG_MAPPING[kind] for kind in types}
    return {kind: config for kind, config in configs.items() if kind not in REFUSED}


def defaults_of(kind: str) -> dict[str, Any]:
    """Return the default of each option of a type."""
    defaults = {field.name: field.default for field in dataclasses.fields(peft_types()[kind])}
    return {**defaults, **completed(kind, {})}


def completed(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options with what PEFT's config insists on although it follows from them, or is not known yet."""
    if kind == "adalora":  # the number of steps of the run, which has not started
        return {"total_step": options.get("tinit", 0) + options.get("tfinal", 0) + 1, **options}
    if kind == "oft":  # either the number of blocks or their size
        return {"oft_block_size": 0, **options} if options.get("r") else {"r": 0, "oft_block_size": 32, **options}
    return options


def _config_class(kind: str) -> Any:
    if kind in REFUSED:
        raise petune.ConfigError(f"the type {kind} of PEFT cannot be a petune method: {REFUSED[kind]}")
    known = peft_types()
    if kind in known:
        return known[kind]
    names = ", ".join(sorted(known))
    if not kind:
        raise petune.ConfigError(f"peft needs a type: peft:TYPE. Known: {names}")
    similar = difflib.get_close_matches(kind, known, 3, 0.5)
    hint = f"Did you mean {' or '.join(similar)}?" if similar else f"Known: {names}"
    raise petune.ConfigError(f"no such PEFT type for vision models: {kind}. {hint}")


def _check_names(kind: str, config_class: Any, options: dict[str, Any]) -> None:
    known = {"targets", *(field.name for field in dataclasses.fields(config_class))} - NOT_ACCEPTED.keys()
    for name in options:
        if name not in known | NOT_ACCEPTED.keys():
            ends = sorted(option for option in known if option.endswith(f"_{name}"))
            rank = ["r"] if name == "rank" and "r" in known else []
            similar = rank or ends or difflib.get_close_matches(name, known, 3)
            hint = f"Did you mean {' or '.join(similar)}?" if similar else f"Options: {', '.join(sorted(known))}"
            raise petune.ConfigError(f"no such option of {kind}: {name}. {hint}")


def _check_values(kind: str, options: dict[str, Any]) -> None:
    if kind == "oft" and options.get("module_dropout"):
        raise petune.ConfigError("module_dropout of oft does nothing: PEFT never applies it. Leave it out")
    if float(options.get("module_dropout") or 0) >= 1:
        raise petune.ConfigError("module_dropout is 1 or more: every module is skipped in training. Use less than 1")
    if kind == "hra" and options.get("apply_GS") and options.get("init_weights", True) is not False:
        raise petune.ConfigError(
            "apply_GS of hra makes its vectors orthogonal, but they start as pairs of equal ones: the output would "
            "change at the start, or be NaN. Set init_weights=false too, or leave apply_GS out"
        )
    if kind == "supertuning" and options.get("lora_dropout") and not options.get("r"):
        raise petune.ConfigError(
            "lora_dropout of supertuning acts on its low-rank part only. Set r too, or leave it out"
        )
    if options.get("init_lora_weights", True) not in IDENTITY_STARTS:
        raise petune.ConfigError(
            f"init_lora_weights is none of {IDENTITY_STARTS}: other values change the backbone's weights"
        )
    if options.get("bias", "none") != "none":
        raise petune.ConfigError("bias is not 'none'; attach bitfit as well to train biases")
    for name, reason in NOT_ACCEPTED.items():
        is_read = name in NEED_TARGETS and "target_modules" in options
        if options.get(name) and not is_read:
            raise petune.ConfigError(f"{name} is not accepted: {reason}")
