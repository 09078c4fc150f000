"""Tuners by name: listed from metadata, imported when one is asked for.

They register through the entry-point group `petune.tuners`, the built-in ones too. A plugin cannot take the name of a
tuner that comes with petune.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from petune.base.entry_points import PluginKind
from petune.base.errors import ConfigError, PluginError, UnknownName, did_you_mean
from petune.base.plugins import PluginRecord, list_plugins, load_plugin, plugin_errors

if TYPE_CHECKING:
    from petune.injector.tuner import Tuner, TunerConfig

TUNERS = PluginKind(
    group="petune.tuners",
    noun="method",
    hint="`petune methods` lists the installed ones; for a plugin's method install its package first, such as "
    "pip install petune-NAME",
)


def list_tuners() -> list[PluginRecord]:
    """List every registered tuner, petune's own first, without importing any."""
    return list_plugins(TUNERS)


def check_registered(method: str) -> None:
    """Check that a method's name is registered, before anything that takes seconds to import is.

    Raises:
        UnknownName: No tuner has that name.
        ConfigError: An option is not of the form key=value.
    """
    name, _ = parse_method(method)
    known = {record.name for record in list_tuners()}
    if not {name, name.partition(":")[0]} & known:
        raise UnknownName(TUNERS.noun, name, known, TUNERS.hint)


def check_loads(record: PluginRecord) -> str:
    """Return `ok`, or why the tuner cannot be used. Imports it, unless its metadata already says so."""
    if record.state != "ok":
        return record.state
    try:
        load_tuner(record.name)
    except PluginError as error:
        return str(error)
    return "ok"


def load_tuner(name: str) -> type[Tuner[Any]]:
    """Import the tuner class that is registered as `name`.

    Raises:
        UnknownName: No tuner has that name.
        PluginError: Two packages claim the name, or the package cannot be loaded; it and the cause are named.
    """
    from petune.injector.tuner import Tuner, TunerConfig

    return load_plugin(TUNERS, name, Tuner, TunerConfig)


def registered_name(cls: type[Tuner[Any]]) -> str:
    """Return the name that a tuner's class is registered under; empty for one that is not."""
    for record in list_tuners():
        module, _, name = record.target.partition(":")
        is_near = module.partition(".")[0] == cls.__module__.partition(".")[0]  # imported already
        if is_near and name == cls.__qualname__ and record.state == "ok" and load_tuner(record.name) is cls:
            return record.name
    return ""


def build_tuner(method: str | Tuner[Any] | TunerConfig, **options: Any) -> Tuner[Any]:
    """Build a configured tuner.

    Args:
        method: A registered name, a Tuner, or the config of a built-in tuner. A name may hold options, as
            `vpt:deep=false`; `family:kind` is the tuner `family` with the option `type=kind`, as `peft:ia3`.
        **options: The tuner's options.

    Raises:
        UnknownName, PluginError: See `load_tuner`.
        ConfigError: An option is unknown, wrong or given twice.
    """
    from petune.injector.tuner import Tuner, TunerConfig

    if isinstance(method, Tuner):
        return type(method)(method.config, **options) if options else method
    if isinstance(method, TunerConfig):
        return _build_from_config(method, options)
    if not isinstance(method, str) or not method:
        raise UnknownName("method", str(method), {t.name for t in list_tuners()}, "Pass a name, a Tuner or its config")
    return _build_from_name(method, options)


def call_hook(tuner: Tuner[Any], hook: str, value: Any) -> Any:
    """Call a tuner's method of training; an unexpected error names its package.

    Args:
        tuner: The tuner.
        hook: `calibrate`, `on_train_start`, `on_step_end`, `loss` or `aux_loss`.
        value: The step, the number of steps, the batches, or what the adapters have set.

    Raises:
        PluginError: The tuner of another package failed.
    """
    with plugin_errors(TUNERS, tuner.method, type(tuner), f"ran {hook}"):
        return getattr(tuner, hook)(value)


def parse_method(text: str) -> tuple[str, dict[str, Any]]:
    """Split a method into its name and options: `vpt:deep=false` is `("vpt", {"deep": False})`.

    A name may hold a colon itself, as `peft:ia3` does; options may follow it after a comma: `peft:ia3,targets=mlp`.

    Raises:
        ConfigError: An option is not of the form key=value.
    """
    from petune.base.yaml_values import parse_options

    before_value, equals, _ = text.partition("=")
    name, colon, _ = before_value.rpartition(":")  # a value may hold a colon, as {cat: 3} does
    if colon and equals:
        options = text[len(name) + 1 :]
        kind, comma, rest = options.partition(",")
        if comma and "=" not in kind:
            return f"{name}:{kind.strip()}", parse_options(rest)
        return name, parse_options(options)
    return text, {}


def _build_from_config(config: TunerConfig, options: dict[str, Any]) -> Tuner[Any]:
    """Build the built-in tuner whose config class this is; plugins are not imported to look."""
    for record in list_tuners():
        if record.is_own and load_tuner(record.name).Config is type(config):
            tuner = load_tuner(record.name)(config, **options)
            tuner.method = record.name
            return tuner
    raise UnknownName("method", type(config).__name__, [], "Pass the Tuner itself: MyTuner(config)")


def _build_from_name(method: str, options: dict[str, Any]) -> Tuner[Any]:
    name, named_options = parse_method(method)
    twice = named_options.keys() & options.keys()
    if twice:
        raise ConfigError(f"{', '.join(sorted(twice))} is given twice, in the method's name and as a keyword")
    options = {**named_options, **options}
    family, colon, kind = name.partition(":")
    cls = load_tuner(family)
    if colon and "type" not in cls.Config.model_fields:
        known = cls.Config.model_fields
        option, suggestion = (kind, "") if kind in known else ("OPTION", did_you_mean(kind, known))
        raise ConfigError(f"options are written {family}:{option}=VALUE, but the method is {name!r}{suggestion}")
    if colon and options.get("type", kind) != kind:
        raise ConfigError(f"{name} already has the type {kind}, but type={options['type']} is given too. Leave one out")
    config = cls.Config.build({"type": kind, **options} if colon else options, f"the options of {name}")
    with plugin_errors(TUNERS, family, cls, "was made"):
        tuner = cls(config)
    tuner.method = family
    return tuner
