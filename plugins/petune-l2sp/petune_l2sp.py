"""L2-SP: full fine-tuning that stays near the pretrained weights, by a term of the loss."""

import torch
from pydantic import Field
from torch import Tensor, nn

import petune


class L2SPConfig(petune.TunerConfig):
    """Options of L2-SP.

    Attributes:
        alpha: α, the pull toward the pretrained weights; the paper searches 1e-4 to 1.
        beta: β, the pull of the classifier toward zero; the paper's 0.01.
    """

    alpha: float = Field(0.1, ge=0)
    beta: float = Field(0.01, ge=0)


class L2SP(petune.Tuner[L2SPConfig]):
    """Train every parameter, with a penalty on the distance from the pretrained weights.

    L2-SP (Li, Grandvalet & Davoine, ICML 2018, arXiv 1802.01483), with w0 the backbone as it was when the tuner was
    attached:

        loss + α/2 · ‖w - w0‖² + β/2 · ‖head‖²

    Trains: all parameters. No module is added; a second copy of the backbone is kept during training.
    Parameters: all.

    Differs from the paper: nothing.
    """

    recipe = petune.Recipe(lr=2e-4, weight_decay=0.0)

    def attach(self, edit: petune.Edit) -> None:
        """Unfreeze everything, and keep a copy of the backbone's weights."""
        trained = edit.train(edit.model)
        head = [p for module in edit.sites.head.modules for p in module.parameters()]
        self.head: list[nn.Parameter] = list({id(p): p for p in head}.values())
        own = {id(p) for p in self.head}
        self.start = [(p, p.detach().clone()) for p in trained if id(p) not in own]

    def loss(self, step: int) -> Tensor:
        """Return α/2 · ‖w - w0‖² + β/2 · ‖head‖²."""
        distance = torch.stack([(p - start).square().sum() for p, start in self.start]).sum()
        head_norm = torch.stack([p.square().sum() for p in self.head]).sum()
        return self.config.alpha / 2 * distance + self.config.beta / 2 * head_norm
