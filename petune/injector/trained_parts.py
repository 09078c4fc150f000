"""Record the parts of a model that one attachment trains, and the values that attachments exchange."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from petune.injector.keys import TensorOwner
from petune.injector.sparse import SparseParameters


@dataclass(eq=False)
class TensorValues:
    """The values of one tensor that attachments train in place.

    The model holds the value of the last enabled attachment or, without one, the original. The others wait here.

    Attributes:
        tensor: The model's tensor when it was first trained.
        original: Its value from before; None if that was not kept.
        trained: For each attachment, in the order of attaching, its trained value; None while the model holds it.
    """

    tensor: Tensor
    original: Tensor | None
    trained: dict[str, Tensor | None] = field(default_factory=dict)


@dataclass(eq=False)
class TrainedParts:
    """Parameters that one attachment trains, and those that it added.

    Attributes:
        parameters: All parameters that it trains, the classifier's among them.
        added: Parameters that were not in the model before.
        added_buffers: Buffers that were not, each as its module and its name there.
        modules: Modules that go to train mode.
        sparse: Entries that it trains of parameters that were in the model before.
        in_place: By state_dict key, the values of the tensors that it trains in place.
        enabled: False while the attachment is disabled.
        set_aside: Parameters that were frozen because it was disabled when another attachment came or went.
    """

    parameters: tuple[nn.Parameter, ...] = ()
    added: tuple[Tensor, ...] = ()
    added_buffers: tuple[TensorOwner, ...] = ()
    modules: tuple[nn.Module, ...] = ()
    sparse: tuple[SparseParameters, ...] = ()
    in_place: dict[str, TensorValues] = field(default_factory=dict)
    enabled: bool = True
    set_aside: tuple[Tensor, ...] = ()

    def with_gradient(self) -> set[int]:
        """Return the identities of the parameters that require a gradient: all that train, if only some entries."""
        return {id(p) for p in self.parameters} | {id(p) for entries in self.sparse for p in entries.targets}
