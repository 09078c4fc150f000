"""PEFT's types as methods: `lora`, `dora`, and `peft:<type>` for every type of PEFT that edits single layers.

petune chooses the layers (from the sites, so nobody needs a model's names; the classifier is never one of them), PEFT
does the rest. What is saved loads with `PeftModel.from_pretrained` on the same model, and the other way round. PEFT
itself is imported when a tuner is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

import petune
from petune.tuners.peft_bridge.options import DoraConfig, LoraConfig, PeftConfig, completed, peft_types
from petune.tuners.peft_bridge.parts import Targets
from petune.tuners.peft_bridge.targets import choose_targets, options_for

if TYPE_CHECKING:
    from petune.tuners.peft_bridge.adalora import RankBudget

NOT_IDENTITY = {"fourierft", "unilora", "vblora", "c3a"}
"""Types that change the output right after attaching."""

PeftConfigT = TypeVar("PeftConfigT", bound=PeftConfig)


class PeftTuner(petune.Tuner[PeftConfigT]):
    """Base of the methods that PEFT carries out."""

    recipe = petune.Recipe(lr=2e-3, weight_decay=0.0)
    budget: RankBudget | None = None

    def __init__(self, config: PeftConfigT | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self.identity_at_init = _is_identity_at_init(self.config.type, self.config.peft_options)

    def attach(self, edit: petune.Edit) -> None:
        """Let PEFT wrap the target layers, and register what it has added."""
        from petune.tuners.peft_bridge.wrapping import wrap_layers

        kind = self.config.type
        if "target_modules" in self.config.peft_options:
            targets = Targets([], [])
            options = completed(kind, self.config.peft_options)
        else:
            targets = choose_targets(edit, self.config)
            options = options_for(edit, self.config, targets)
        self.wrapped = wrap_layers(edit, peft_types()[kind](**options), targets.paths(), targets.rows)
        if kind == "adalora":
            from petune.tuners.peft_bridge.adalora import RankBudget

            self.budget = RankBudget(edit, self.wrapped)

    @property
    def training_calls(self) -> frozenset[str]:
        """Only AdaLoRA needs the calls below."""
        return super().training_calls if self.config.type == "adalora" else frozenset()

    def on_train_start(self, total_steps: int) -> None:
        """Let AdaLoRA schedule its ranks over these steps; its option total_step takes precedence."""
        if self.budget is not None:
            self.budget.on_train_start(self.config.peft_options.get("total_step", total_steps))

    def on_step_end(self, step: int) -> None:
        """Let AdaLoRA remove ranks."""
        if self.budget is not None:
            self.budget.allocate(step + 1)

    def loss(self, step: int) -> Tensor | None:
        """Return AdaLoRA's orthogonality term; no other type has a term of its own."""
        return None if self.budget is None else self.budget.orthogonality_loss()

    def to_external(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return PEFT's own config and tensors, with the classifier among them."""
        from petune.tuners.peft_bridge.saving import to_peft

        return to_peft(self.wrapped, state)


def _is_identity_at_init(kind: str, options: Mapping[str, Any]) -> bool:
    """Return False for types, and options of types, that change the output right after attaching."""
    starts = [value for key, value in options.items() if key.startswith("init_") or key == "init_weights"]
    rank = options.get("r", 8)
    has_odd_rank = kind == "hra" and isinstance(rank, int) and rank % 2 == 1  # reflections only cancel in pairs
    return kind not in NOT_IDENTITY and False not in starts and not has_odd_rank


class Peft(PeftTuner[PeftConfig]):
    """Use any PEFT type that edits single layers: peft:ia3, peft:oft, and others.

    Trains: PEFT's adapters at the linear layers.

    Differs from PEFT: layers come from the sites; the classifier trains as with every method, instead of through
    `modules_to_save`; a layer whose weight is read without a call is never a target, because PEFT's layer would do
    nothing there. timm's BEiT, EVA and Swin-V2 are made to call it; other such layers are named in a warning.
    """


class Lora(PeftTuner[LoraConfig]):
    """Add a low-rank change to the weights of linear layers.

    LoRA (Hu et al., ICLR 2022, arXiv 2106.09685), by PEFT:

        y = W x + (α/r) · B A x        A random, B zero

    Trains: A and B per linear layer of attention and MLP. Identity at the start.
    Parameters: r·(in + out) per layer; 16·D·r per block with an MLP of 4·D (qkv 4, proj 2, MLP 5 and 5). ViT-B/16,
    r = 8: 1,179,648.

    Differs from the paper: all linear layers instead of the attention's q and v alone; `targets=attn` for those of the
    attention, `targets=[q,v]` for the paper's, also where one layer makes q, k and v: each has its own A and B. r = 8
    and α = 8 are PEFT's defaults.
    """


class Dora(PeftTuner[DoraConfig]):
    """Change direction and magnitude of linear layers separately.

    DoRA (Liu et al., ICML 2024, arXiv 2402.09353), by PEFT:

        W' = m · (W + B A) / ‖W + B A‖        m starts as ‖W‖, the norm of each output's weights

    Trains: A, B and m per linear layer of attention and MLP. Identity at the start.
    Parameters: those of LoRA and one per output of each layer. ViT-B/16, r = 8: 1,262,592.

    Differs from the paper: nothing in the formula; α/r scales B A as in LoRA. A fused qkv counts as one layer.
    """
