"""Adapters to a hub on this machine and back; every refusal is one message in time, and nothing is lost by it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch

import petune
from petune.base.errors import CheckpointError, HubError, PetuneError, UsageError
from petune.serving import share
from petune.serving.share import pull, push
from tests.fake_hub import TOKEN, Server, point_at, running
from tests.program import call
from tests.tiny import X, randomised, tiny
from tests.trained import changed

# of httpx2, about how huggingface_hub 2.4 sends bytes
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with running() as served:
        point_at(served.url, tmp_path / "cache", monkeypatch, silence_s=7.0)  # a busy machine is no silent hub
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.chdir(tmp_path)
        yield served


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    randomised(petune.attach(tiny(), "adaptformer")).save(tmp_path / "a", metadata={"classes": list("abcde")})
    return tmp_path / "a"


def test_it_works_in_a_process_that_imported_nothing_before(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "petune", "pull", "me/pets"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=env, check=False)
    assert "HF_HUB_OFFLINE is set" in done.stderr


def there(place: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in place.iterdir()}


def left_over(place: Path) -> list[str]:
    return [file.name for file in place.iterdir() if file.name.startswith(".")]


def test_there_and_back(hub: Server, adapter: Path, tmp_path: Path) -> None:
    pushed = push(adapter, "me/flowers", private=True)
    assert (pushed.repo, pushed.new, pushed.url) == ("me/flowers", True, f"{hub.url}/me/flowers")
    assert hub.private == {"me/flowers"}
    assert hub.repos["me/flowers"] == there(adapter)
    pulled = pull("me/flowers")
    assert (pulled.output, pulled.method, pulled.commit) == ("flowers", "adaptformer", pushed.commit)
    assert there(tmp_path / "flowers") == there(adapter)
    att = petune.load(tiny(), "flowers")
    assert torch.equal(att.model(X), petune.load(tiny(), adapter).model(X))
    assert left_over(tmp_path) == []


def test_an_update_replaces_and_an_edited_card_goes_along(hub: Server, adapter: Path) -> None:
    push(adapter, "me/flowers")
    (adapter / "README.md").write_text("---\nlicense: mit\n---\nmine")
    with pytest.raises(HubError, match=r"me/flowers exists at .* already; --update adds a commit"):
        push(adapter, "me/flowers")
    assert not push(adapter, "me/flowers", update=True).new
    pull("me/flowers")
    assert (Path("flowers") / "README.md").read_text() == "---\nlicense: mit\n---\nmine"
    hub.repos["me/flowers"]["README.md"] = b"edited on the hub"
    hub.repos["me/flowers"]["weights.bin"] = b"a pickle"
    pull("me/flowers")
    assert sorted(there(Path("flowers"))) == sorted(share.MOST_BYTES)
    petune.load(tiny(), "flowers")


@pytest.mark.filterwarnings("ignore")
def test_what_peft_wrote_needs_no_manifest(hub: Server, tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["qkv"], r=2))
    model.save_pretrained(tmp_path / "by-peft")
    push(tmp_path / "by-peft", "me/lora")
    del hub.repos["me/lora"]["manifest.json"]
    assert pull("me/lora").method == "peft"
    petune.load(tiny(), "lora")


def asked_of(hub: Server, adapter: Path, what: str) -> PetuneError:
    """What a command says, in under ten seconds."""
    started = time.monotonic()
    with pytest.raises(PetuneError) as caught:
        push(adapter, "me/flowers") if what == "push" else pull("me/flowers", "out")
    assert time.monotonic() - started < 10
    assert "\n" not in str(caught.value)
    assert not Path("out").exists()
    assert left_over(Path()) == []
    return caught.value


@pytest.fixture
def impatient(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that hubs that hang are given up soon."""
    monkeypatch.setattr("petune.serving.transfer.STALL_TIMEOUT_S", 2.0)
    monkeypatch.setattr(share, "COMMIT_S", 2.0)


PUSH_FAULTS = [
    ("/api/repos/create", "403", "does not let this token do that with me/flowers .403."),
    ("/api/repos/create", "hangs", "cannot be used for me/flowers now: TimeoutError: no data for 2 s"),
    ("/preupload/", "500", r"cannot be used .*me/flowers was made and is empty: add --update"),
    ("/objects/batch", "hangs", "no data for 2 s"),
    ("/lfs-put/", "403", "403"),
    ("/commit/", "400", "BadRequestError"),
]


@pytest.mark.parametrize(("where", "fault", "message"), PUSH_FAULTS)
def test_a_bad_hub_is_named_by_push(
    where: str, fault: str, message: str, hub: Server, adapter: Path, impatient: None
) -> None:
    hub.fault = (where, fault)
    with pytest.raises(HubError, match=message):
        raise asked_of(hub, adapter, "push")


PULL_FAULTS = [
    ("/api/models/", "500", "cannot be used for me/flowers now"),
    ("/api/models/", "hangs", "no data for 2 s"),
    ("/resolve/", "500", "cannot be used for me/flowers now"),
    ("safetensors", "cut off", "me/flowers"),
    ("safetensors", "stalls", "no data for 2 s"),
    ("safetensors", "other bytes", "adapter_model.safetensors of me/flowers must have the SHA-256 that the hub says"),
    ("adapter_config", "other bytes", r"me/flowers/adapter_config\.json is damaged|me/flowers is not an adapter"),
]


@pytest.mark.parametrize(("where", "fault", "message"), PULL_FAULTS)
def test_a_bad_hub_is_named_by_pull(
    where: str, fault: str, message: str, hub: Server, adapter: Path, impatient: None
) -> None:
    hub.repos["me/flowers"] = there(adapter)
    hub.fault = (where, fault)
    with pytest.raises(PetuneError, match=message):
        raise asked_of(hub, adapter, "pull")


def test_without_token_network_or_repository(hub: Server, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HubError, match=r"there is no model repository me/flowers at .* that you may see"):
        raise asked_of(hub, adapter, "pull")
    with pytest.raises(HubError, match="there is no model repository me/none"):
        push(adapter, "me/none", update=True)
    hub.repos["me/flowers"] = there(adapter)
    with pytest.raises(HubError, match="has no such revision"):
        pull("me/flowers", revision="v9")
    hub.repos.clear()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="does not let this token"):
        raise asked_of(hub, adapter, "push")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="needs a token that may write; run `hf auth login`, or set HF_TOKEN"):
        raise asked_of(hub, adapter, "push")
    asked = len(hub.asked)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for what in ("push", "pull"):
        with pytest.raises(HubError, match="HF_HUB_OFFLINE is set; nothing was sent or fetched"):
            raise asked_of(hub, adapter, what)
    assert len(hub.asked) == asked
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"http://127\.0\.0\.1:9 cannot be reached"):
        raise asked_of(hub, adapter, "pull")


@pytest.mark.parametrize("method", ["adaptformer", "lora"])
def test_folders_of_this_machine_stay_here(method: str, hub: Server, tmp_path: Path) -> None:
    said = {"dataset": "folder:/home/me/secret/pets", "backbone": {"name": "vit", "weights": "/home/me/secret/w.pt"}}
    petune.attach(tiny(), method).save(tmp_path / "a", metadata=said)
    assert b"secret" in (tmp_path / "a" / "adapter_config.json").read_bytes()
    push(tmp_path / "a", "me/flowers")
    assert not [name for name, content in hub.repos["me/flowers"].items() if b"secret" in content]
    pull("me/flowers")
    config = json.loads(Path("flowers/adapter_config.json").read_bytes())
    own = config if method == "adaptformer" else config["auto_mapping"]["petune"]
    assert (own["metadata"]["dataset"], own["metadata"]["backbone"]["weights"]) == ("folder:pets", "w.pt")
    petune.load(tiny(), "flowers")


def test_the_commands(hub: Server, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = call("push", adapter, "me/flowers", capture=capsys)
    assert (done.code, done.out.split()[0]) == (0, f"{hub.url}/me/flowers")
    assert done.err == "download it with: petune pull me/flowers\n"
    done = call("pull", "me/flowers", "here", "--json", capture=capsys)
    assert json.loads(done.out)["output"] == "here"
    done = call("pull", "me/none", capture=capsys)
    assert (done.code, done.err.count("\n")) == (4, 1)


def test_wrong_names_and_foreign_directories(hub: Server, adapter: Path, tmp_path: Path) -> None:
    for name in ("a/b/c", "../up", "", "x y"):
        with pytest.raises(UsageError, match="a repository is named as user/name"):
            pull(name, "out")
    hub.repos["me/flowers"] = there(adapter)
    shutil.copytree(adapter, tmp_path / "mine")
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for place in ("mine", "file", str(tmp_path)):
        with pytest.raises(UsageError, match="is not an adapter directory"):
            pull("me/flowers", place)
    with pytest.raises(CheckpointError, match="an adapter directory must be there, but there is no"):
        push(tmp_path / "nowhere", "me/x")
    assert "me/x" not in hub.repos


def test_what_is_no_adapter_is_not_taken(hub: Server, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = there(adapter)
    hub.repos["me/flowers"] = {"adapter_model.bin": b"\x80\x02", "adapter_config.json": b"{}"}
    with pytest.raises(CheckpointError, match=r"lacks adapter_model\.safetensors; it has adapter_config\.json, "):
        raise asked_of(hub, adapter, "pull")
    hub.repos["me/flowers"] = files
    monkeypatch.setitem(share.MOST_BYTES, "adapter_config.json", 10)
    with pytest.raises(CheckpointError, match=r"adapter_config.json of me/flowers must have at most 10 bytes"):
        raise asked_of(hub, adapter, "pull")
    monkeypatch.undo()


def test_more_bytes_than_said_are_not_waited_for(hub: Server, adapter: Path) -> None:
    hub.repos["me/flowers"] = there(adapter)
    hub.listed_size, hub.fault = 10, ("safetensors", "endless")
    assert "me/flowers" in str(asked_of(hub, adapter, "pull"))


CODE = [
    {"name": "subprocess:run", "options": {"args": ["true"]}},
    {"name": "hf:x/y", "options": {"trust_remote_code": True}},
]


@pytest.mark.parametrize("backbone", CODE)
def test_code_is_not_taken_unasked(backbone: dict[str, Any], hub: Server, adapter: Path) -> None:
    changed(adapter, adapter, backbone=backbone)
    hub.repos["me/flowers"] = there(adapter)
    with pytest.raises(CheckpointError, match=r"code that using it would run here.*--trust-remote-code"):
        raise asked_of(hub, adapter, "pull")
    assert pull("me/flowers", "trusted", trust_remote_code=True).output == "trusted"
