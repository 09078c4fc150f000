"""PEFT's tuners as methods: `lora`, `dora`, and `peft:<type>` for every type of PEFT that edits single layers.

petune says which layers (from the sites, so nobody needs a model's names; the classifier is never one), PEFT does
the rest. What is saved loads with `PeftModel.from_pretrained` on the same model, and the other way round. PEFT
itself is imported when a tuner is made.

    LoRA (Hu et al., ICLR 2022, arXiv 2106.09685):      y = W x + (α/r) · B A x        A random, B zero
    DoRA (Liu et al., ICML 2024, arXiv 2402.09353):     W' = m · (W + B A) / ‖W + B A‖
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, cast

from pydantic import ConfigDict, Field, model_validator
from torch import Tensor, nn

import petune

if TYPE_CHECKING:
    from petune.tuners.adalora import Budget

REFUSED = {
    "lily": "its router averages over the batch, so that the logit of an image depends on the others",
    "xlora": "it mixes adapters that exist already",
    "poly": "it needs the task of every image",
    "trainable_tokens": "it trains word embeddings",
    "shadow": "it needs a language model",
    "cartridge": "it needs a language model",
    "prompt_tuning": "it puts prompts before word embeddings; use vpt",
    "multitask_prompt_tuning": "it puts prompts before word embeddings; use vpt",
    "p_tuning": "it puts prompts before word embeddings; use vpt",
    "cpt": "it puts prompts before word embeddings; use vpt",
    "prefix_tuning": "it puts prefixes in a language model's cache of keys and values; use vpt",
    "petune": "it stands for petune's own methods; name one of them",
    "adaption_prompt": "it knows the attentions of three language models; use vpt",
}
NOT_IDENTITY = {"fourierft", "unilora", "vblora", "c3a"}
MUST_DIVIDE = {
    "c3a": "block_size",
    "vblora": "vector_length",
    "road": "group_size",
    "oft": "oft_block_size",
    "miss": "r",
}
LAYERS = ("layers_to_transform", "layers_pattern")
NOT_HERE = {
    "modules_to_save": "the classifier trains anyway; attach partial or norm beside it to train more",
    "inference_mode": "what is attached trains",
    "task_type": "the task is to classify images",
    "save_only_topk_weights": "the file must hold all that trains",
    **dict.fromkeys(LAYERS, "PEFT looks at it only where target_modules is given too"),
}
CHANGES_WEIGHTS = "init_lora_weights"
PLAIN_STARTS = (True, False, "gaussian", "orthogonal")


class PeftConfig(petune.TunerConfig):
    """Options of a PEFT type; all options of PEFT's own config are taken too, as `r` and `lora_alpha`.

    Attributes:
        type: PEFT's name of it in small letters: `lora`, `ia3`, `oft`, …
        targets: Which linear layers of every block: those of attention, of the MLP, or both.
    """

    model_config = ConfigDict(extra="allow")

    type: str = ""  # none is refused with the names of all
    targets: Literal["attn", "mlp", "all"] = "all"

    @model_validator(mode="after")
    def _known(self) -> Self:
        known = peft_types()
        if self.type in REFUSED:
            raise ValueError(f"the type {self.type} of PEFT cannot be a petune method: {REFUSED[self.type]}")
        if self.type not in known:
            raise ValueError(
                f"there is no PEFT type {self.type!r} for vision models; there are {', '.join(sorted(known))}"
            )
        options = {f.name for f in dataclasses.fields(known[self.type])}
        for name in self.options:
            if name not in options:
                near = difflib.get_close_matches(name, options, 3)
                hint = f". Did you mean {' or '.join(near)}?" if near else ""
                raise ValueError(f"{known[self.type].__name__} has no option {name!r}{hint}")
        if self.options.get(CHANGES_WEIGHTS, True) not in PLAIN_STARTS:
            raise ValueError(f"{CHANGES_WEIGHTS} must be one of {PLAIN_STARTS}: other starts change the backbone")
        if self.options.get("bias", "none") != "none":
            raise ValueError("bias must be 'none'; attach bitfit beside it to train biases")
        for name, why in NOT_HERE.items():
            if self.options.get(name) and not (name in LAYERS and "target_modules" in self.options):
                raise ValueError(f"{name} cannot be given: {why}")
        try:
            known[self.type](**_completed(self.type, self.options))
        except (ValueError, TypeError) as error:
            raise ValueError(f"this is refused by PEFT's {known[self.type].__name__}: {error}") from None
        return self

    @property
    def options(self) -> dict[str, Any]:
        """What goes to PEFT's config."""
        return dict(self.model_extra or {})


class LoraConfig(PeftConfig):
    """Options of LoRA; further ones of PEFT's LoraConfig are taken too.

    Attributes:
        r: Rank.
        lora_alpha: α; the change is scaled by α/r.
        lora_dropout: On what enters A.
    """

    type: str = "lora"
    r: int = Field(8, ge=1)
    lora_alpha: float = Field(8, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)

    @property
    def options(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("r", "lora_alpha", "lora_dropout")}
        return {**own, **super().options}


class DoraConfig(LoraConfig):
    """Options of DoRA: those of LoRA."""

    use_dora: Literal[True] = True

    @property
    def options(self) -> dict[str, Any]:
        return {**super().options, "use_dora": True}


PeftConfigT = TypeVar("PeftConfigT", bound=PeftConfig)


class PeftTuner(petune.Tuner[PeftConfigT]):
    """Any PEFT type that edits single layers.

    Differs from PEFT: layers come from the sites; the classifier trains as with every method, instead of through
    `modules_to_save`; a layer whose weight is read without a call is never a target, since PEFT's layer would do
    nothing there (timm's BEiT and EVA are told to call it, others are named in a warning).
    """

    recipe = petune.Recipe(lr=2e-3, weight_decay=0.0)
    budget: Budget | None = None

    def __init__(self, config: PeftConfigT | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        starts = [v for k, v in self.config.options.items() if k.startswith("init_") or k == "init_weights"]
        self.identity_at_init = self.config.type not in NOT_IDENTITY and False not in starts

    def attach(self, edit: petune.Edit) -> None:
        """Let PEFT put its layers around the targets, and take over what it has added."""
        from petune.tuners.peft_layers import Wrapped

        chosen = "target_modules" in self.config.options
        bare = [] if chosen else self._bare(edit)
        targets = [] if chosen else self._targets(edit, bool(bare))
        own = _completed(self.config.type, self.config.options)
        options = self._options(edit, targets) if not chosen else own
        if bare:
            options = {**options, "target_parameters": [f"{_path(site)}.in_proj_weight" for site in bare]}
        self.wrapped = Wrapped(
            edit, peft_types()[self.config.type](**options), [_path(site) for site in (*targets, *bare)]
        )
        if self.config.type == "adalora":
            from petune.tuners.adalora import Budget

            self.budget = Budget(edit, self.wrapped)

    def on_train_start(self, total_steps: int) -> None:
        """AdaLoRA shares out its ranks over so many steps, unless the option total_step says otherwise."""
        if self.budget is not None:
            self.budget.on_train_start(self.config.options.get("total_step", total_steps))

    def on_step_end(self, step: int) -> None:
        """AdaLoRA takes away ranks."""
        if self.budget is not None:
            self.budget.allocate(step + 1)

    def loss(self, step: int) -> Tensor | None:
        """AdaLoRA keeps its factors near orthogonal; no other type has a term of its own."""
        return None if self.budget is None else self.budget.regularity()

    def to_external(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's own config and tensors, the classifier among them, for the adapter directory."""
        return self.wrapped.to_external(state)

    @classmethod
    def from_external(cls, peft_config: dict[str, Any]) -> dict[str, Any]:
        """From a config that PEFT wrote to the one that petune would have."""
        kind = str(peft_config["peft_type"]).lower()
        known = {f.name: f for f in dataclasses.fields(peft_types()[kind])} if kind in peft_types() else {}
        skipped = {
            "peft_type",
            "peft_version",
            "auto_mapping",
            "inference_mode",
            "base_model_name_or_path",
            "revision",
            "task_type",
        }
        options = {k: v for k, v in peft_config.items() if k in known and k not in skipped and v != known[k].default}
        saved = options.pop("modules_to_save", None)
        config = {"type": kind, **{k: v for k, v in options.items() if v not in (None, {}, [])}}
        return {"tuner": "peft", "config": config, "train_head": bool(saved)}

    def _places(self, edit: petune.Edit) -> list[petune.Site]:
        roles = ("attn", "mlp") if self.config.targets == "all" else (self.config.targets,)
        places: list[petune.Site] = []
        for block in edit.sites.require_blocks():
            found = [block.parts[role] for role in roles if role in block.parts]
            bare = not found and self.config.targets == "all"
            places += [block] if bare else found  # attention and MLP that cannot be told apart are all of a block
        return places

    def _bare(self, edit: petune.Edit) -> list[petune.Site]:
        """Attentions of torch that hold q, k and v as one bare weight, which PEFT's plain LoRA can change too."""
        options = self.config.options
        if self.config.type != "lora" or options.get("use_dora") or options.get("lora_dropout"):
            return []
        inside = [m for site in self._places(edit) for m in site.enter.modules()]
        fused = [m for m in inside if isinstance(m, nn.MultiheadAttention) and m.in_proj_weight is not None]
        called = edit.called(fused)
        return [edit.site(m) for m in fused if m in called]

    def _targets(self, edit: petune.Edit, others: bool) -> list[petune.Site]:
        """Sites of the layers to wrap; there may be none where there are `others`.

        Raises:
            AttachError: There is none that PEFT's layer would be called in.
        """
        blocks = edit.sites.require_blocks()
        if self.config.type == "ln_tuning":
            norms = [b.parts.get(role) for b in blocks for role in ("norm1", "norm2")] + [edit.sites.parts.get("norm")]
            known = [s for s in norms if s is not None and isinstance(s.module, nn.LayerNorm)]
            known = [s for s in known if s.module.weight is not None]  # one without has nothing to train (Qwen3's last)
            if not known:
                raise petune.AttachError(
                    f"ln_tuning needs torch's LayerNorm, but {edit.sites.model} has others in its blocks; use norm"
                )
            return known
        places = self._places(edit)
        for site in places:
            edit.use_qkv_module(site)
        # a side of the stream's width: not the small network that makes a table of positions (Swin-V2)
        targets = [
            layer
            for site in places
            for layer in edit.linear_layers(site, pointwise=self.config.type == "lora")
            if site.dim in cast(nn.Linear, layer.module).weight.shape
        ]
        targets = list({id(layer.module): layer for layer in targets}.values())
        unread = [layer for site in places for layer in edit.uncalled_linears(site)]
        model, names = edit.sites.model, ", ".join(dict.fromkeys(layer.path for layer in unread[:3]))
        if not targets and not others:
            raise petune.AttachError(
                f"{self.config.type} needs linear layers that are called, but {model} calls none in "
                f"{self.config.targets}{f': it reads the weights of {names} itself' if unread else ''}. "
                "Use targets=mlp, or adaptformer"
            )
        if unread:
            warnings.warn(
                f"{model} reads the weights of {len(unread)} linear layers without calling them, as {names}: they "
                f"get no {self.config.type}, the other {len(targets)} do",
                stacklevel=2,
            )
        return targets

    def _options(self, edit: petune.Edit, targets: list[petune.Site]) -> dict[str, Any]:
        """PEFT's options: the user's, the targets, and what must fit the layers' sides where nothing was asked for."""
        kind = self.config.type
        options = self.config.options
        names = _exactly([_path(site) for site in targets], edit.model)
        sides = [side for site in targets for side in cast(nn.Linear, site.module).weight.shape]
        default: Any = {f.name: f.default for f in dataclasses.fields(peft_types()[kind])}
        default |= _completed(kind, {})
        fitting: dict[str, Any] = {}
        if kind in MUST_DIVIDE and not (kind == "oft" and options.get("r")):
            fitting[MUST_DIVIDE[kind]] = math.gcd(default[MUST_DIVIDE[kind]], *sides)
        elif kind == "shira":
            fitting["r"] = min(default["r"], min(sides) // 4)
        elif kind == "waveft":
            fitting["n_frequency"] = min(default["n_frequency"], min(sides) ** 2)
        elif kind == "ia3":
            last = [edit.linear_layers(block.mlp)[-1:] for block in edit.sites.blocks if "mlp" in block.parts]
            chosen = {_path(site) for site in targets}
            fitting["feedforward_modules"] = [_path(s) for found in last for s in found if _path(s) in chosen]
        return {"target_modules": names, **_completed(kind, options), **fitting, **options}


class Peft(PeftTuner[PeftConfig]):
    """Any PEFT type, chosen by the option `type`."""


class Lora(PeftTuner[LoraConfig]):
    """LoRA on the linear layers of attention and MLP.

    Parameters: r·(in + out) a layer; 16·D·r a block with an MLP of 4·D (qkv 4, proj 2, MLP 5 and 5). ViT-B/16,
    r = 8: 1,179,648.
    """


class Dora(PeftTuner[DoraConfig]):
    """DoRA on the linear layers of attention and MLP. Parameters: those of LoRA and one a layer and output."""


def _completed(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options with what PEFT's config asks for though it follows from the others, or is not known yet."""
    if kind == "adalora":  # the steps of a run that is not there yet
        return {"total_step": options.get("tinit", 0) + options.get("tfinal", 0) + 1, **options}
    if kind == "oft":  # either the blocks' number or their size
        return {"oft_block_size": 0, **options} if options.get("r") else {"r": 0, "oft_block_size": 32, **options}
    return options


def _path(site: petune.Site) -> str:
    """Where the layer was before another adapter of PEFT was put around it."""
    return site.path.replace(".base_layer", "")


def _exactly(paths: list[str], model: nn.Module) -> list[str] | str:
    """The paths as PEFT takes them: it compares ends, so that where one path ends another it needs an expression."""
    endings = tuple(f".{path}" for path in paths)
    if any(name.endswith(endings) for name, _ in model.named_modules()):
        return "|".join(re.escape(path) for path in paths)
    return paths


def peft_types() -> dict[str, Any]:
    """PEFT's config classes by type in small letters, without those that are refused."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    usable: Iterable[Any] = PEFT_TYPE_TO_TUNER_MAPPING
    found = {kind.value.lower(): PEFT_TYPE_TO_CONFIG_MAPPING[kind] for kind in usable}
    return {k: c for k, c in found.items() if k not in REFUSED}
