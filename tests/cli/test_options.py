"""The shared flags: each sets a key of RunConfig, shows its true default, and --set overrides it."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import yaml

from petune.base.errors import ConfigError, UsageError
from petune.base.yaml_values import parse_value
from petune.cli.flags import FLAGS, Flag
from petune.cli.pretrain import DEFAULTS as PRETRAIN_DEFAULTS
from petune.cli.settings import Settings, parse_seeds
from petune.runner.pretrain import RECIPE, PretrainConfig
from petune.runner.run_config import RunConfig

Run = Callable[..., Any]

IN_WORDS = {
    "data-dir",
    "image-size",
    "patch-size",
    "shots",
    "lr",
    "weight-decay",
    "optimizer",
    "output",
    "from",
}
FLAG_NAMES = [flag.name for flag in FLAGS]


def _field(flag: Flag, config: type[RunConfig] = RunConfig) -> tuple[Any, Any]:
    """Return type and default of the flag's key."""
    section: Any = config
    default: Any = config()
    *sections, last = flag.key.split(".")
    for key in sections:
        section = section.model_fields[key].annotation
        default = getattr(default, key)
    annotation = section.model_fields[last].annotation
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(t for t in get_args(annotation) if t is not NoneType)
    return annotation, getattr(default, last)


@pytest.mark.parametrize("flag", FLAGS, ids=FLAG_NAMES)
def test_a_flag_shows_the_default_of_its_key(flag: Flag) -> None:
    _, default = _field(flag)
    if flag.name in IN_WORDS:
        assert default is None
    else:
        assert flag.default == ("" if default is False else str(default))


@pytest.mark.parametrize("flag", FLAGS, ids=FLAG_NAMES)
def test_a_flag_has_the_type_of_its_key(flag: Flag) -> None:
    kind, _ = _field(flag)
    if get_origin(kind) is Literal:
        assert flag.metavar == "|".join(get_args(kind))
    else:
        assert flag.type is (get_args(kind)[0] if get_origin(kind) is Annotated else kind)


def test_pretrain_shows_its_own_defaults() -> None:
    recipe = {"lr": RECIPE.lr, "weight-decay": RECIPE.weight_decay, "optimizer": RECIPE.optimizer}
    for flag in FLAGS:
        if flag.name == "method":
            continue
        shown = PRETRAIN_DEFAULTS.get(flag.name, flag.default)
        if flag.name in recipe:
            assert parse_value(shown) == recipe[flag.name]
        elif flag.name not in IN_WORDS and flag.type is not bool:
            assert shown == str(_field(flag, PretrainConfig)[1])


def test_set_overrides_flags_override_the_file_overrides_defaults(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("seed: 1\nmethod: vpt\ntrain:\n  epochs: 2\n  lr: 0.5\n  batch_size: 7\n")
    settings = Settings(file, {"train.epochs": 3, "train.lr": 0.25, "dataset": "digits"}, ("train.lr=1e-3",))
    config = RunConfig.build(settings.values(), settings.source)
    assert (config.seed, config.method, config.dataset, config.backbone) == (1, "vpt", "digits", "vit_base")
    assert (config.train.epochs, config.train.lr, config.train.batch_size) == (3, 0.001, 7)
    assert settings.source == f"{file} and the command line"


@pytest.mark.exhaustive
def test_flags_that_are_not_given_leave_the_file_alone(petune: Run, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("dataset: digits\nresume: true\noutput: there\ntrain: {epochs: 4}\n")
    done = petune("run", "--config", "a.yaml", "--method", "linear", "--dry-run")
    shown = yaml.safe_load(done.out)
    assert (shown["dataset"], shown["resume"], shown["output"], shown["train"]["epochs"]) == (
        "digits", True, "there", 4,
    )  # fmt: skip


def test_all_problems_are_in_one_message(petune: Run) -> None:
    done = petune("run", "--lr", "-3", "--augment", "foo", "--set", "train.epohcs=3", "--set", "data_dri=1")
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        "error: 4 problems in the command line:\n"
        "  - train.lr: should be greater than 0 (got -3.0)\n"
        "  - train.augment: no such augmentation: foo. Did you mean color? (got 'foo')\n"
        "  - no such key: train.epohcs. Did you mean train.epochs?\n"
        "  - no such key: data_dri. Did you mean data_dir or dataset?\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--set", "train.lr"), "error: not an assignment: 'train.lr'. Write it as key.key=value\n"),
        (("--config", "no.yaml"), "error: cannot read the config file no.yaml"),
        (("--seeds", "0,b"), "error: --seeds needs comma-separated integers, e.g. 0,1,2; got '0,b'\n"),
        (
            ("--seeds", "0,1", "--seed", "3"),
            "error: give --seed for one run or --seeds for several, not both\n",
        ),
    ],
)
def test_wrong_values_exit_with_2(words: tuple[str, ...], message: str, petune: Run) -> None:
    done = petune("run", *words)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(message)


def test_a_key_below_a_plain_value_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("train: 3\n")
    with pytest.raises(UsageError, match=r"cannot set train\.epochs: 'train' is 3"):
        Settings(file, {"train.epochs": 3}, ()).values()
    with pytest.raises(ConfigError, match="valid dictionary"):
        RunConfig.build(Settings(file, {}, ()).values())


def test_sections_of_a_file_merge_wherever_they_are(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    own = {"methods", "run"}
    merged = {"run": {"train": {"epochs": 3, "batch_size": 8, "lr": 0.1}, "backbone": "vit_nano"}}
    parts = ["train: {epochs: 3}", "run: {backbone: vit_nano, train: {batch_size: 8}}", "train.lr: 0.1"]
    for lines in permutations(parts):
        file.write_text("\n".join(lines))
        assert Settings(file, {}, ()).values(own) == merged
    assert Settings(file, {"train.epochs": 4}, ("train.lr=1",)).values(own)["run"]["train"] == {
        "epochs": 4,
        "batch_size": 8,
        "lr": 1,
    }


@pytest.mark.parametrize(
    ("lines", "key"),
    [
        (("train: {epochs: 3}", "run: {train: {epochs: 4}}"), "run.train.epochs"),
        (("run: {seed: 1}", "seed: 2"), "run.seed"),
        (("train.lr: 0.1", "train: {lr: 0.2}"), "run.train.lr"),
        (("train: 3", "train.lr: 0.1"), "run.train"),
    ],
)
def test_two_values_of_one_key_of_a_file_are_refused(lines: tuple[str, ...], key: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("\n".join(lines))
    with pytest.raises(UsageError, match=rf"a\.yaml gives {re.escape(key)} twice"):
        Settings(file, {}, ()).values({"methods", "run"})


def test_seeds_are_parsed() -> None:
    assert parse_seeds("0,1, 2") == (0, 1, 2)


COMPARE, SWEEP = ("compare", "linear", "--dry-run"), ("sweep", "adaptformer", "--dry-run")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*SWEEP, "--search=bottleneck=2", "--search=bottleneck=4"), "--search bottleneck is given twice"),
        ((*COMPARE, "--seed=1", "--seeds=2,3"), "give --seed for one run or --seeds for several, not both"),
        ((*COMPARE, "--set=seed=5"), "--set seed has no effect"),
        ((*COMPARE, "--set=run.method=vpt"), "--set run.method has no effect"),
        (("run", "--dry-run", "--seeds=0,1", "--set=seed=7"), "give --seed for one run or --seeds for several"),
        (("run", "--dry-run", "--seeds=banana"), "--seeds needs comma-separated integers"),
        (("run", "--dry-run", "--tracker=nothing"), "no such tracker: nothing"),
        (("pretrain", "--dry-run", "--tracker=nothing"), "no such tracker: nothing"),
        ((*COMPARE, "--jobs=2", "--executor=serial"), "--executor serial is given too"),
        ((*COMPARE, "--executor=banana"), "no such executor: banana"),
        ((*SWEEP, "--search=bottleneck=2", "--executor=banana"), "no such executor: banana"),
        ((*COMPARE, "--seeds=0,1", "--set=seeds=[4]"), "--seeds and --set seeds are both given"),
        ((*COMPARE, "--seed=1", "--set=seeds=[4]"), "--seed and --set seeds are both given"),
        ((*COMPARE, "--set=methods=[full]"), "METHOD and --set methods are both given"),
        ((*COMPARE, "--set=datasets=[digits]"), "--dataset and --set datasets are both given"),
        ((*COMPARE, "--dataset=shapes", "--set=dataset=cifar100"), "--set dataset has no effect on several datasets"),
        ((*COMPARE, "--baseline=linear", "--set=baseline=null"), "--baseline and --set baseline are both given"),
        ((*SWEEP, "--search=bottleneck=2", "--set=method=bitfit"), "METHOD and --set method are both given"),
        ((*SWEEP, "--search=bottleneck=2", "--trials=5", "--set=trials=7"), "--trials and --set trials are both given"),
        ((*SWEEP, "--search=bottleneck=2", "--no-test", "--set=test=true"), "--no-test and --set test are both given"),
        ((*SWEEP, "--search=bottleneck=2", "--set=run.output=x"), "--set run.output has no effect in a sweep"),
        ((*SWEEP, "--search=bottleneck=2", "--set=resume=true"), "--set resume has no effect in a sweep"),
        ((*SWEEP, "--search=train.lr=.1,.2", "--lr=0.5"), "train.lr is searched, but one value of it is given too"),
        ((*SWEEP, "--search=train.lr=.1,.2", "--set=run.train.lr=1"), "train.lr is searched, but one value"),
        (("sweep", "vpt:deep=false", "--search=deep=true", "--dry-run"), "deep is searched, but one value"),
        (("run", "--dry-run", "--folds=3", "--set=folds=2"), "--folds and --set folds are both given"),
        (("run", "--dry-run", "--seeds=0,1", "--resume", "--output=fresh"), "nothing to resume in fresh"),
        (("run", "--dry-run", "--folds=2", "--resume", "--output=fresh"), "nothing to resume in fresh/fold-1"),
        (("run", "--dry-run", "--method=lora:r=4,r=16"), "the option r is given twice"),
        (("pretrain", "--dry-run", "--set=method=linear"), "linear"),
        (("pretrain", "--dry-run", "--set=mean=[.9,.9,.9]"), "mean is given without std"),
    ],
)
def test_no_option_is_silently_ignored(words: tuple[str, ...], message: str, petune: Run) -> None:
    done = petune(*words, "--backbone=vit_nano", "--dataset=digits")
    assert (done.code, done.out) == (2, "")
    assert message in done.err


@pytest.mark.exhaustive
def test_paths_expand_the_home_directory(petune: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text("output: ~/y\ndata_dir: ~/data\n")
    shown = yaml.safe_load(petune("run", "--config", "~/a.yaml", "--backbone=vit_nano", "--dry-run").out)
    assert (shown["output"], shown["data_dir"]) == (f"{tmp_path}/y", f"{tmp_path}/data")
    words = ("run", "--output=~/x", "--backbone=vit_nano", "--dataset=digits")
    assert yaml.safe_load(petune(*words, "--dry-run").out)["output"] == f"{tmp_path}/x"
    assert f"{tmp_path}/none.safetensors" in petune(*words, "--weights=~/none.safetensors").err
    (tmp_path / "here").mkdir()
    assert petune("plugin", "new", "mine", "--in", "~/here").code == 0
    assert (tmp_path / "here" / "petune-mine" / "pyproject.toml").is_file()
    assert f"{tmp_path}/there" in petune("report", "~/there", "--output=~/r.html").err
    assert not (tmp_path / "~").exists()


def test_a_path_that_is_not_utf8_is_refused(petune: Run, tmp_path: Path) -> None:
    done = petune("compare", "linear", "--output", "o\udcff", "--dataset=digits", "--backbone=vit_nano")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: the path is not UTF-8")
    assert not list(tmp_path.iterdir())
