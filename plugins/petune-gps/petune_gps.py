"""GPS: train, of each output of every layer, the weights with the largest gradients.

Legend: B images, D width of the features.
"""

from collections.abc import Iterable

import torch
from pydantic import Field
from torch import Tensor, nn

import petune


class GPSConfig(petune.TunerConfig):
    """Options of GPS.

    Attributes:
        per_output: K, the weights that train of each output of a layer; the authors' 1 on VTAB.
        num_batches: Training batches that the gradients are summed over; 0 takes all of one epoch, as the authors do.
        loss: `contrastive` compares the features of images, as the authors do, and needs classes as targets; `task` is
            the loss of the training, through the new classifier.
        temperature: Of the contrastive loss.
    """

    per_output: int = Field(1, ge=1)
    num_batches: int = Field(0, ge=0)
    loss: str = Field("contrastive", pattern="^(contrastive|task)$")
    temperature: float = Field(0.07, gt=0)


class GPS(petune.Tuner[GPSConfig]):
    """Train the K weights with the largest gradients of each output of a layer, and biases.

    GPS (Zhang et al., CVPR 2024, arXiv 2312.10136):

        M_ij = 1 where |∂L/∂W_ij| is among the K largest of row i, else 0
        W ← W − lr · M ⊙ ∂L/∂W

    L is the supervised contrastive loss of the features, summed over one epoch before the first step.

    Trains: K weights per output of each layer, and biases. Layers are those of the blocks and the patch embedding.
    Identity at the start.
    Parameters: (K + 1)·9·D per block with an MLP of 4·D, (K + 1)·D for the patch embedding. ViT-B/16, K = 1: 167,424.

    Differs from the paper: each image is seen in one view, augmented as in training, not in two; an image that is the
    only one of its class in a batch has no part in the loss. LayerScale stays frozen, and biases that are not a layer's
    (BEiT's of q and v).

    Recipe: with vit_nano on 800 images of CIFAR-10 (20 epochs, batch 128, seed 0, bfloat16) top-1 on 200 of val was
    64.0 at 1e-3, 68.5 at 3e-3, 68.0 at 1e-2 and 64.5 at 3e-2, and lower at 1e-4, 3e-4 and 1e-1. One image is 0.5.
    """

    recipe = petune.Recipe(lr=3e-3, weight_decay=0.0)

    def attach(self, edit: petune.Edit) -> None:
        """Let entries of all layers train; which ones is chosen later."""
        self.head = edit.sites.parts.get("head")
        own = set(edit.backbone())
        self.entries = []
        for layers in layers_of(edit.sites):
            parameters = [p for module in layers if module in own for p in weights_and_biases(module)]
            if parameters:
                self.entries.append(edit.train(parameters, mask=[self.largest(p, p) for p in parameters]))

    def calibrate(self, batches: Iterable[petune.CalibrationBatch]) -> None:
        """Sum up gradients of the training batches, and choose the largest of each row."""
        for number, batch in enumerate(batches, 1):
            loss = self.contrastive_loss(batch) if self.config.loss == "contrastive" else batch.loss()
            if loss.requires_grad:
                loss.backward()
            if number == self.config.num_batches:
                break
        for entries in self.entries:
            gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in entries.targets]
            pairs = zip(entries.targets, gradients, strict=True)
            entries.choose([self.largest(p, gradient) for p, gradient in pairs])

    def largest(self, p: Tensor, gradient: Tensor) -> Tensor:
        """Return the mask of the K largest gradients of each row; all entries of a bias."""
        mask = torch.zeros_like(p, dtype=torch.bool)
        if p.ndim < 2:
            return ~mask
        rows = gradient.detach().flatten(1).abs()
        chosen = rows.topk(min(self.config.per_output, rows.shape[1]), dim=1).indices
        return mask.flatten(1).scatter(1, chosen, value=True).view(p.shape)

    def contrastive_loss(self, batch: petune.CalibrationBatch) -> Tensor:
        """Return the supervised contrastive loss of what enters the classifier (arXiv 2004.11362, equation 2)."""
        if self.head is None or batch.target.ndim != 1 or batch.target.is_floating_point():
            raise petune.UsageError("GPS compares features of classes, which these targets are not. Use gps:loss=task")
        (features,) = batch.entering([self.head])
        pooled = features.flatten(1, -2).mean(1) if features.ndim > 2 else features
        x_BD = nn.functional.normalize(pooled.float())
        same_BB = (batch.target[:, None] == batch.target).fill_diagonal_(False)
        logits_BB = (x_BD @ x_BD.T / self.config.temperature).fill_diagonal_(-torch.inf)
        log_BB = logits_BB.log_softmax(1).masked_fill(~same_BB, 0)
        return -(log_BB.sum(1) / same_BB.sum(1).clamp(min=1)).mean()

    def num_parameters(self, sites: petune.Sites) -> int:
        """Return K per output of every layer, and its biases."""
        parameters = [p for layers in layers_of(sites) for module in layers for p in weights_and_biases(module)]
        k = self.config.per_output
        return sum(len(p) * min(k, p[0].numel()) if p.ndim > 1 else len(p) for p in parameters)


def layers_of(sites: petune.Sites) -> list[list[nn.Module]]:
    """Return the modules of each block, and those of the patch embedding unless its block was left out; each once."""
    roots = [block.own_modules for block in sites.require_blocks()]
    if "patch_embed" in sites.parts and sites.blocks[0] is sites.all_blocks[0]:
        roots.append((sites.patch_embed.module,))
    seen: set[nn.Module] = set()
    groups = []
    for own in roots:
        modules = [m for m in dict.fromkeys(m for root in own for m in root.modules()) if m not in seen]
        seen |= set(modules)
        groups.append(modules)
    return groups


def weights_and_biases(module: nn.Module) -> list[nn.Parameter]:
    """Return those of a layer; nothing for norms, LayerScale, and tables of positions."""
    own = dict(module.named_parameters(recurse=False))
    is_layer = any(p.ndim > 1 and name.endswith("weight") for name, p in own.items())
    return [p for name, p in own.items() if is_layer and name.endswith(("weight", "bias"))]
