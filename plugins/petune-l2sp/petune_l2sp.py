"""L2-SP (Li, Grandvalet & Davoine, ICML 2018, arXiv 1802.01483): full fine-tuning, held near the pretrained weights.

    loss + α/2 · ‖w - w0‖² + β/2 · ‖head‖²        w0: the backbone as it was when the tuner was attached

No module is added: the tuner unfreezes the model and adds a term to the loss.
"""

import torch
from pydantic import Field
from torch import Tensor, nn

import petune


class L2SPConfig(petune.TunerConfig):
    """Options of L2-SP.

    Attributes:
        alpha: Pull towards the pretrained weights; the paper searches 1e-4 to 1.
        beta: Pull of the classifier towards zero; the paper's 0.01.
    """

    alpha: float = Field(0.1, ge=0)
    beta: float = Field(0.01, ge=0)


class L2SP(petune.Tuner[L2SPConfig]):
    """L2-SP. Parameters: all. It keeps a second copy of the backbone while it trains.

    Differs from the paper: nothing.
    """

    recipe = petune.Recipe(lr=2e-4, weight_decay=0.0)

    def attach(self, edit: petune.Edit) -> None:
        """Unfreeze everything; remember where the backbone began."""
        trained = edit.train(edit.model)
        head = [p for module in edit.sites.head.modules for p in module.parameters()]
        self.head: list[nn.Parameter] = list({id(p): p for p in head}.values())
        own = {id(p) for p in self.head}
        self.start = [(p, p.detach().clone()) for p in trained if id(p) not in own]

    def loss(self, step: int) -> Tensor:
        """α/2 · ‖w - w0‖² + β/2 · ‖head‖²."""
        moved = torch.stack([(p - start).square().sum() for p, start in self.start]).sum()
        size = torch.stack([p.square().sum() for p in self.head]).sum()
        return self.config.alpha / 2 * moved + self.config.beta / 2 * size
