"""The speed benchmark runs, and what it compares with computes the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from speed_peers import PEERS, SIZES, injected, written_out

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_the_hand_written_model_is_the_injected_one_to_the_bit(bf16: bool, fused: bool) -> None:
    size, found = SIZES["toy"], []
    x, y = size.batch()
    models = injected(size), written_out(size)
    with torch.no_grad():
        for key, p in models[0].named_parameters():
            if ".petune_adaptformer" in key:
                p.normal_(std=0.1)
    models[1].copy_from(models[0])
    for model in models:
        for module in model.modules():
            for name in ("fused_attn", "fused"):
                if hasattr(module, name):
                    setattr(module, name, fused)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(x)
        torch.nn.functional.cross_entropy(logits.float(), y).backward()
        found.append([logits, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(found[0]) == len(found[1])
    names = [sorted(p.sum().item() for p in grads[1:]) for grads in found]
    assert torch.equal(found[0][0], found[1][0])
    assert names[0] == pytest.approx(names[1], rel=1e-5, abs=1e-7)


@pytest.mark.exhaustive
def test_the_benchmark_runs_on_a_toy(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "speed.py"
    words = [sys.executable, str(script), "--quick", "--no-memory", "--output", str(tmp_path)]
    subprocess.run(words, check=True, capture_output=True, timeout=300)
    found = json.loads((tmp_path / "speed.json").read_text())
    steps = found["steps"]["toy"]
    assert set(steps["times_s"]) == set(PEERS)
    assert all(len(times) == 3 and min(times) > 0 for times in steps["times_s"].values())
    assert steps["flops"] > 1e6
    assert 0 < steps["floor_share"]["low"] <= steps["floor_share"]["median"] <= steps["floor_share"]["high"] < 1
    assert steps["petune_is_faster_by"]["petune adaptformer"]["median"] == 1
    assert found["provenance"]["device"]
    assert found["smoke"] is True  # docs/speed.md refuses it
    page = (tmp_path / "speed.md").read_text()
    assert all(f"| {name} |" in page for name in PEERS)
    assert "`petune --help`: " in page


@pytest.mark.exhaustive
def test_the_benchmark_of_images_runs_on_a_few() -> None:
    script = ROOT / "benchmarks" / "data_speed.py"
    words = [sys.executable, str(script), "--images", "40", "--rounds", "1"]
    done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=300)
    assert "decode: petune is " in done.stdout
    assert "epoch: petune is " in done.stdout
