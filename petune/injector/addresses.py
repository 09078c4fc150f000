"""Addresses: where a saved tensor belongs, in any version of the library that the model comes from.

State_dict keys are names, and libraries rename their modules. An address has no name of the library's in it:

- An adapter that a verb put in: the block and the site, or the block and the contents of the single layer.
- A tensor that was put in by hand, such as PEFT's: the block, and the contents of the layer around it.
- A tensor of the backbone that trains: the block, and its own contents from before.
- A tensor of the classifier: its module among those of the head.

Contents are those at the time of attaching, so they are the same when an adapter is saved and when it is loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from torch import Tensor, nn

from petune.adapters.fingerprint import sampled_digest
from petune.injector.edit_log import EditLog, Placed
from petune.injector.frozen import block_owners
from petune.injector.keys import TensorOwner, renamed_key
from petune.injector.trainable import added_to
from petune.sites.sites import Sites

OUTSIDE = -1
"""The index of the block for what is in none."""


def addresses_of(
    model: nn.Module, sites: Sites, log: EditLog, tensors: Mapping[str, Tensor], buffers: Mapping[str, TensorOwner]
) -> dict[str, str]:
    """Return the addresses of tensors that an attachment saves, by state_dict key; no two are the same.

    Args:
        model: The model, right after the tuner has attached to it.
        sites: Its sites.
        log: What the tuner did.
        tensors: What is saved, by state_dict key.
        buffers: By state_dict key, the buffers that are saved, also those that are None yet.
    """
    wanted = {id(t): key for key, t in tensors.items()}
    slots = [(wanted[id(t)], m, n) for m in model.modules() for n, t in m._parameters.items() if id(t) in wanted]
    slots += [(key, module, name) for key, (module, name) in buffers.items()]
    finder = AddressFinder(model, sites, log)
    found: dict[str, tuple[str, tuple[str, int]]] = {}
    for key, module, name in slots:
        address = finder.address(module, name), finder.rank(module)
        found[key] = min(address, found.get(key, address))  # several modules may share a tensor
    return _numbered({key: a for key, (a, _) in found.items()}, {key: rank for key, (_, rank) in found.items()})


class AddressFinder:
    """Finds the addresses of tensors in a model with an attachment."""

    def __init__(self, model: nn.Module, sites: Sites, log: EditLog) -> None:
        self._label = f"petune_{log.label}"
        self._added = {id(t) for t in log.new_tensors()} | added_to(model)
        self._paths = {module: path for path, module in model.named_modules()}
        self._modules = {path: module for module, path in self._paths.items()}
        self._positions = {module: position for position, module in enumerate(self._paths)}
        self._blocks = block_owners(sites)
        self._contents: dict[nn.Module, str] = {}
        head = sites.parts.get("head")
        self._head = {module: f"head/{index}" for index, module in enumerate(head.modules if head is not None else ())}
        self._roles = {id(site): site.role for block in sites.all_blocks for site in (block, *block.inner_sites)}
        self._roles |= {id(site): role for role, site in sites.parts.items()}
        self._adapters = dict(self._adapter_address(placed) for placed in log.placed)
        self._adapters = _numbered(self._adapters, dict.fromkeys(self._adapters, 0))

    def address(self, module: nn.Module, name: str) -> str:
        """Return the address of the tensor that a module holds under a name; tensors of the same contents share it."""
        tensor = module._parameters.get(name, module._buffers.get(name))
        for ancestor, within in self._ancestors(module):
            if ancestor in self._adapters:
                return f"{self._adapters[ancestor]}/{within}{name}"
            if ancestor in self._head:
                return f"{self._head[ancestor]}/{within}{name}"
        if tensor is not None and id(tensor) not in self._added:
            return f"{self._block(module)}/{sampled_digest(tensor)}"
        around = ((a, within) for a, within in self._ancestors(module) if self._has_own(a))
        layer, within = next(around, (module, ""))
        return f"{self._block(layer)}/{self._contents_of(layer)}/{renamed_key(within + name, self._label, 'petune')}"

    def rank(self, module: nn.Module) -> tuple[str, int]:
        """Return what orders tensors of the same address: biases and norms of a new model are all the same.

        They are in the order of the contents of the layers that they belong to, then in that of the modules.
        """
        return self._contents_of(module), self._positions[module]

    def _adapter_address(self, placed: Placed) -> tuple[nn.Module, str]:
        site = placed.sites[-1]
        role = self._roles.get(id(site)) or self._contents_of(site.exit)
        return placed.holder, f"{self._block(site.exit)}/{role}"

    def _ancestors(self, module: nn.Module) -> list[tuple[nn.Module, str]]:
        """Return the module and those that it is in, from the inside, each with the rest of the path and a dot."""
        parts = self._paths[module].split(".") if self._paths[module] else []
        cuts = range(len(parts), -1, -1)
        return [(self._modules[".".join(parts[:n])], "".join(f"{part}." for part in parts[n:])) for n in cuts]

    def _block(self, module: nn.Module) -> int:
        return next((self._blocks[a] for a, _ in self._ancestors(module) if a in self._blocks), OUTSIDE)

    def _has_own(self, module: nn.Module) -> bool:
        return any(id(p) not in self._added for p in module.parameters())

    def _contents_of(self, module: nn.Module) -> str:
        if module not in self._contents:
            own = sorted(sampled_digest(p) for p in module.parameters() if id(p) not in self._added)
            self._contents[module] = sha256(" ".join(own).encode()).hexdigest()[:12]
        return self._contents[module]


def _numbered(addresses: Mapping[Any, str], ranks: Mapping[Any, Any]) -> dict[Any, str]:
    """Return the addresses with a number after those that are not the first of their kind."""
    counts: Counter[str] = Counter()
    numbered: dict[Any, str] = {}
    for key in sorted(addresses, key=lambda k: ranks[k]):
        address = addresses[key]
        counts[address] += 1
        numbered[key] = address if counts[address] == 1 else f"{address}/{counts[address]}"
    return numbered


def file_addresses(
    addresses: Mapping[str, str], state: Mapping[str, Tensor], file_state: Mapping[str, Tensor]
) -> dict[str, str]:
    """Return the addresses by an adapter file's keys.

    Args:
        addresses: By state_dict key.
        state: What is saved, by state_dict key.
        file_state: The same tensors, or views of them, by the file's keys. What is no tensor of `state` has no address.
    """
    keys = {id(t): key for key, t in state.items()}
    of_views = {(t.data_ptr(), t.shape): key for key, t in state.items()} if {*state} != {*file_state} else {}

    def state_key(tensor: Tensor) -> str:
        return keys.get(id(tensor)) or of_views.get((tensor.data_ptr(), tensor.shape), "")

    named = {key: addresses.get(state_key(tensor), "") for key, tensor in file_state.items()}
    return {key: address for key, address in named.items() if address}
