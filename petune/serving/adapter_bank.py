"""Many adapters on one backbone: selected by name, or mixed within one batch."""

from __future__ import annotations

import hashlib
import json
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from petune.adapters.format import TENSOR_FILE, SavedAdapter, adapter_path, read_adapter
from petune.base.arguments import LONGEST_SHOWN, PathText, check_arguments, check_input_size
from petune.base.config import expand_home, shown
from petune.base.errors import AttachError, CheckpointError, UsageError
from petune.base.files import MANIFEST
from petune.base.text import plural
from petune.injector.trainable import check_not_in_bank, trainable_state_of
from petune.serving.bank_forward import BankForward
from petune.serving.bank_kind import AdapterKind, Owner
from petune.serving.bank_loading import KindLoader
from petune.serving.bank_memory import ResidentValues
from petune.sites.find import find_sites
from petune.sites.input_spec import Inputs


@dataclass(frozen=True, eq=False)
class BankEntry:
    """One loaded adapter.

    Attributes:
        path: Its directory, which is read again when its values have left memory.
        method: The method's name.
        num_bytes: Memory of its values, the classifier's among them.
    """

    path: Path
    method: str
    num_bytes: int
    kind: AdapterKind = field(repr=False)
    digest: str = field(repr=False)


class AdapterBank:
    """Many adapters on one model, each with its own classifier.

    Several threads may use a bank at once: calls wait for each other, and for `load`, `use` and `remove`. `use` then
    `model(x)` are two steps, between which another thread may choose another adapter.

    While it holds adapters, nothing else can be attached to the model: call `close`, or use the bank in a `with` block.

    Attributes:
        model: The backbone, in eval mode, with its own classifier.
        adapters: The loaded adapters by name.
        active: Name of the adapter that `model(x)` uses; None is the backbone's own output.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        input_size: Sequence[int] | None = None,
        example: Any = None,
        max_memory: int | None = None,
    ) -> None:
        """Create an empty bank.

        Args:
            model: A backbone with nothing attached.
            input_size: (channels, height, width), for a model that does not state its input size.
            example: What its forward takes, if that is not one image; see `petune.find_sites`.
            max_memory: Bytes of the adapters that are kept in memory, next to the backbone. Those that were not used
                for the longest time leave it, and are read from their directories when they are used again. None, the
                default, keeps all.

        Raises:
            AttachError: Something is attached to the model, or its classifier is not a single module.
        """
        check_arguments("petune.AdapterBank", model=(model, nn.Module), max_memory=(max_memory, int | None))
        check_input_size("petune.AdapterBank", input_size)
        if max_memory is not None and max_memory < 0:
            raise UsageError(f"max_memory is {max_memory}. Use a number of bytes, or None for no limit")
        check_not_in_bank(model)
        if trainable_state_of(model) is not None:
            raise AttachError("a tuner is attached to this model. Call its detach() first")
        self.model = model.eval()
        self.adapters: dict[str, BankEntry] = {}
        self.active: str | None = None
        self._sites = find_sites(model, input_size, example=example)
        head = self._sites.head
        if not head.is_module:
            raise AttachError(
                f"a bank exchanges one classifier, and {self._sites.model} has several heads ({head.where}). "
                "Load one adapter at a time with petune.load, and detach it before the next"
            )
        self._forward = BankForward(self.model, self._sites)
        self._loader = KindLoader(self._forward, self)
        self._resident = ResidentValues(max_memory)
        self._active = Owner()
        self._versions: list[int] = []
        self._lock = threading.RLock()

    @property
    def num_bytes(self) -> int:
        """Memory of the adapters that are in memory now."""
        return self._resident.num_bytes

    def load(self, name: str, path: str | Path) -> BankEntry:
        """Load an adapter directory under a name; its number of classes may differ from the others'.

        The first adapter of a kind (method, options and shapes) is attached, and it is checked that the model is the
        one that it was trained on. Others of the kind prove that they belong to the same backbone by what is recorded
        in their configuration.

        Raises:
            UsageError: The name is taken.
            BackboneMismatch: The adapter was trained on another backbone.
            CheckpointError: The directory is damaged, or there is no adapter in it.
            PluginError: The adapter's method is not installed.
        """
        check_arguments("load", name=(name, str), path=(path, PathText))
        self._check_free(name)
        directory = adapter_path(expand_home(path)).absolute()
        saved = read_adapter(directory)
        with self._lock:
            self._check_free(name)
            self._forward.check_head()
            with self._inactive():
                kind, values = self._loader.load(name, saved)
            assert kind is not None
            assert values is not None
            entry = BankEntry(directory, saved.config["tuner"], values.num_bytes, kind, _digest(saved))
            kind.names.add(name)
            self.adapters[name] = entry
            self._resident.add(entry, values)
        return entry

    def use(self, name: str | None) -> nn.Module:
        """Make `model(x)` use an adapter, or None for the backbone's own output; return the model.

        Raises:
            UsageError: No adapter of that name is loaded.
            CheckpointError: Its values have left memory, and cannot be read again.
        """
        check_arguments("use", name=(name, str | None))
        with self._lock:
            self._forward.check_head()
            owner = Owner() if name is None else self._owner(name)
            if self._deactivate() and name is not None and name == self.active:
                owner = self._owner(name)
            self.active = name
            self._activate(owner)
        return self.model

    def remove(self, name: str) -> None:
        """Take an adapter from the model and forget it.

        Raises:
            UsageError: No adapter of that name is loaded.
        """
        check_arguments("remove", name=(name, str))
        with self._lock:
            entry = self._entry(name)
            kind = entry.kind
            if self.active == name:
                self._deactivate()
                self.active = None
            del self.adapters[name]
            self._resident.discard(entry)
            kind.names.discard(name)
            if not kind.names:
                with self._inactive():
                    self._loader.detach(kind)

    def __repr__(self) -> str:
        names = ", ".join(map(repr, self.adapters)) or "none"
        return f"<AdapterBank on {type(self.model).__name__}, adapters: {names}; active: {self.active!r}>"

    def __getstate__(self) -> dict[str, Any]:
        raise UsageError(
            f"an AdapterBank belongs to its own model and cannot be copied or pickled. Make another one on a copy of "
            f"{type(self.model).__name__}, petune.AdapterBank(model), and load the adapters from their directories, "
            "[entry.path for entry in bank.adapters.values()]"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove all adapters: the model is as it was, and something else can be attached to it."""
        with self._lock:
            for name in [*self.adapters]:
                self.remove(name)

    def __call__(self, x: Any, names: Sequence[str | None]) -> list[Tensor]:
        """Compute every row with its own adapter. Rows whose adapters do not affect other rows share one forward.

        Args:
            x: (B, channels, height, width); or what the model takes, in the form of the example.
            names: Adapter of each row; None is the backbone's own output.

        Returns:
            Logits of each row, (C,); C depends on the adapter.

        Raises:
            UsageError: The number of names differs from the number of rows, a name is not loaded, or an argument has
                another type.
            CheckpointError: The values of an adapter have left memory, and cannot be read again.
        """
        names = _as_names(names)
        inputs = self._inputs(x)
        num_rows = self._sites.input_spec.num_samples_in(inputs.tensors)
        if len(names) != num_rows:
            raise UsageError(
                f"x has {plural(num_rows, 'row')}, and there are {plural(len(names), 'name')}. Give one name per row"
            )
        entries = {name: self._entry(name) for name in dict.fromkeys(names) if name is not None}
        owners = {name: Owner() if name is None else self._owner(name) for name in dict.fromkeys(names)}
        with self._lock, self._inactive():
            self._forward.check_head()
            for name, entry in entries.items():
                if self._entry(name) is not entry:  # another thread has exchanged it meanwhile
                    owners[name] = self._owner(name)
            return self._forward.logits(inputs, [owners[name] for name in names])

    def _inputs(self, x: Any) -> Inputs:
        """Return the arguments of a call of the model."""
        spec = self._sites.input_spec
        try:
            inputs = spec.inputs(x)
        except (TypeError, ValueError, LookupError):
            inputs = Inputs(())
        if not inputs.tensors:
            form = "a tensor of a batch" if spec.is_plain else "tensors in the form of the bank's example"
            raise UsageError(f"x must be {form}, not {shown(x, LONGEST_SHOWN)}. Convert arrays with torch.from_numpy")
        return inputs

    def _owner(self, name: str) -> Owner:
        """Return the kind and the values of a loaded adapter; read its values if they have left memory."""
        entry = self._entry(name)
        values = self._resident.get(entry)
        return self._read_again(name, entry) if values is None else Owner(entry.kind, values)

    def _read_again(self, name: str, entry: BankEntry) -> Owner:
        try:
            saved = self._read(name, entry)
        except CheckpointError:
            if self.adapters.get(name) is entry:
                raise
            return self._owner(name)
        with self._lock:
            if self._entry(name) is not entry:  # another thread has exchanged it meanwhile
                return self._owner(name)
            with self._inactive():
                values = self._loader.values(entry.kind, saved)
            self._resident.add(entry, values)
        return Owner(entry.kind, values)

    def _read(self, name: str, entry: BankEntry) -> SavedAdapter:
        """Return the content of an adapter's directory, which is as it was when it was loaded."""
        try:
            content = (entry.path / TENSOR_FILE).read_bytes()
        except OSError as error:
            raise CheckpointError(f"the adapter {name!r} cannot be read again: {error}") from None
        if hashlib.sha256(content).hexdigest() != entry.digest:
            raise CheckpointError(
                f"{entry.path} has changed since it was loaded as {name!r}. Call remove({name!r}) and load it again"
            )
        saved = SavedAdapter(entry.path, entry.kind.config, load_tensors(content))
        if saved.tensors.keys() != entry.kind.tensor_keys:  # of an older format
            return read_adapter(entry.path)
        return saved

    @contextmanager
    def _inactive(self) -> Iterator[None]:
        """Let no adapter be active inside the context, which may be inside another one."""
        active = self._active
        if self._deactivate() and self.active is not None:
            active = self._owner(self.active)
        try:
            yield
        finally:
            self._activate(active)

    def _activate(self, owner: Owner) -> None:
        self._active = owner
        self._forward.activate(owner)
        self._versions = owner.values.versions() if owner.values is not None else []

    def _deactivate(self) -> bool:
        """Let no adapter be active. Return True if something was written to the one that was: it is read again."""
        active, self._active = self._active, Owner()
        self._forward.deactivate(active)
        if active.values is None or self.active is None or active.values.versions() == self._versions:
            return False
        self._resident.discard(self._entry(self.active))
        warnings.warn(
            f"values in the model were changed while the adapter {self.active!r} was in use, as load_state_dict does. "
            "They were the adapter's, which is read again, and the backbone has its own former values there. Call "
            "bank.use(None) before the backbone is changed",
            stacklevel=3,
        )
        return True

    def _check_free(self, name: str) -> None:
        if name in self.adapters:
            raise UsageError(f"an adapter named {name!r} is already loaded. Use another name, or remove it first")

    def _entry(self, name: str) -> BankEntry:
        entry = self.adapters.get(name)
        if entry is None:
            loaded = ", ".join(map(repr, [*self.adapters])) or "none"
            raise UsageError(f"no adapter {name!r} is loaded. Loaded: {loaded}")
        return entry


def _as_names(names: Any) -> list[str | None]:
    """Return the names of the rows as a list.

    Raises:
        UsageError: They are something else.
    """
    is_sequence = isinstance(names, Sequence) and not isinstance(names, str)
    if not is_sequence or not all(name is None or isinstance(name, str) for name in names):
        raise UsageError(
            f"names must be a list with the adapter's name of each row, or None for the backbone, not "
            f"{shown(names, LONGEST_SHOWN)}"
        )
    return list(names)


def _digest(saved: SavedAdapter) -> str:
    """Return the SHA-256 of the tensors' file; petune's directories record it."""
    manifest = saved.path / MANIFEST
    if manifest.is_file():
        return str(json.loads(manifest.read_bytes())["files"][TENSOR_FILE]["sha256"])
    return hashlib.sha256((saved.path / TENSOR_FILE).read_bytes()).hexdigest()
