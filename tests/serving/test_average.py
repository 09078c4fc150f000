"""Averages of adapters against the formulas of the papers, written out on the tensors of the files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import petune
from tests.sampling import sampled
from tests.serving.averages import FILE, X, adapter, backbone, changes, config, fresh, is_head, sha, tensors
from tests.trained import CLASSES, NANO, card, changed


@pytest.mark.parametrize(
    "method",
    sampled(
        ["adaptformer:bottleneck=4", "vpt:num_prompts=2", "bitfit", "full", "linear"],
        {"adaptformer:bottleneck=4", "bitfit"}.__contains__,
    ),
)
def test_the_mean_of_any_method(method: str, tmp_path: Path) -> None:
    paths = [adapter(tmp_path / str(seed), method, seed) for seed in (0, 1, 2)]
    done = petune.average_adapters(paths, tmp_path / "out")
    values = [tensors(path) for path in paths]
    result = tensors(tmp_path / "out")
    assert result.keys() == values[0].keys()
    for key, tensor in result.items():
        expected = torch.stack([v[key].double() for v in values]).mean(0)
        torch.testing.assert_close(tensor.double(), expected, atol=1e-6, rtol=1e-6)
    assert [a.coefficient for a in done.adapters] == pytest.approx([1 / 3] * 3)
    predictor = petune.Predictor(tmp_path / "out", device="cpu")  # checks the reference logits
    assert tuple(predictor.classes) == CLASSES
    differs = bool(done.notes)
    assert differs == (
        method in {"adaptformer:bottleneck=4", "vpt:num_prompts=2"}
    )  # the others start as the backbone is
    recorded = config(tmp_path / "out")["metadata"]
    assert not {"test", "training", "continued_from"} & recorded.keys()
    assert [a["sha256"] for a in recorded["averaged_from"]["adapters"]] == [sha(path) for path in paths]
    text = (tmp_path / "out" / "README.md").read_text()
    assert all(sha(path)[:12] in text for path in paths)


def test_relative_weights(tmp_path: Path) -> None:
    paths = [adapter(tmp_path / str(seed), "bitfit", seed) for seed in (0, 1)]
    petune.average_adapters(paths, tmp_path / "out", coefficients=[3, 1])
    a, b, out = (tensors(path) for path in (*paths, tmp_path / "out"))
    for key in out:
        torch.testing.assert_close(out[key], 0.75 * a[key] + 0.25 * b[key])


@pytest.mark.parametrize("method", ["bitfit", "lora:r=2"])
def test_a_diverged_adapter_is_named(method: str, tmp_path: Path) -> None:
    paths = [adapter(tmp_path / str(seed), method, seed) for seed in (0, 1)]
    att = petune.load(backbone().model, paths[1])
    with torch.no_grad():
        next(iter(att.tuned.values()))[0] = torch.nan
    att.save(tmp_path / "diverged")
    with pytest.raises(petune.CheckpointError, match="diverged holds NaN"):
        petune.average_adapters([paths[0], tmp_path / "diverged"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_lora_is_averaged_as_changes_of_weights(tmp_path: Path) -> None:
    paths = [adapter(tmp_path / str(seed), "lora:r=2,lora_alpha=6", seed) for seed in (0, 1, 2)]
    done = petune.average_adapters(paths, tmp_path / "out")
    assert (done.rank, done.notes) == (6, ())
    assert max(done.errors.values()) < 1e-7
    each, result = [changes(path) for path in paths], changes(tmp_path / "out")
    for layer, change in result.items():
        torch.testing.assert_close(change, torch.stack([c[layer] for c in each]).mean(0), atol=1e-6, rtol=1e-5)
    made = backbone()
    merged = petune.load(made.model, tmp_path / "out")
    logits = made.model.eval()(X)
    merged.merge()
    torch.testing.assert_close(made.model(X), logits, atol=1e-4, rtol=1e-4)
    assert config(tmp_path / "out")["metadata"]["method"] == "lora:r=6,lora_alpha=6"


def test_lora_of_a_given_rank_says_what_is_left_out(tmp_path: Path) -> None:
    paths = [adapter(tmp_path / str(seed), "lora:r=2", seed) for seed in (0, 1, 2)]
    done = petune.average_adapters(paths, tmp_path / "out", rank=2)
    each, result = [changes(path) for path in paths], changes(tmp_path / "out")
    for layer, change in result.items():
        exact = torch.stack([c[layer] for c in each]).mean(0)
        assert float((change - exact).norm() / exact.norm()) == pytest.approx(done.errors[layer], rel=1e-4)
        assert 0.01 < done.errors[layer] < 1
    by_factors = petune.average_adapters(paths, tmp_path / "factors", by_factors=True)
    a, out = "lora_A.weight", tensors(tmp_path / "factors")
    key = next(key for key in out if key.endswith(a))
    torch.testing.assert_close(out[key], torch.stack([tensors(path)[key] for path in paths]).mean(0))
    assert "B·A" in " ".join(by_factors.notes)


def test_task_arithmetic_of_one_seed(tmp_path: Path) -> None:
    """Runs of one seed start with the same random values, which are drawn again."""
    method = "adaptformer:bottleneck=4"
    paths = [adapter(tmp_path / str(noise), method, 7, noise=noise) for noise in (100, 200)]
    start = fresh(method, 7, tmp_path)
    petune.average_adapters(paths, tmp_path / "out", algorithm="task_arithmetic", coefficients=[0.5, -0.2])
    a, b, out = (tensors(path) for path in (*paths, tmp_path / "out"))
    for key, tensor in out.items():
        changed_by = 0.5 * (a[key] - start[key]) - 0.2 * (b[key] - start[key])
        expected = (a[key] + b[key]) / 2 if is_head(key) else start[key] + changed_by
        torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=1e-5)


def test_wise_ft_goes_to_the_backbone(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", "bitfit", 0)
    petune.average_adapters([path], tmp_path / "out", algorithm="wise_ft", coefficients=[0.25])
    start, a, out = fresh("bitfit", 0, tmp_path), tensors(path), tensors(tmp_path / "out")
    for key in out:
        expected = a[key] if is_head(key) else 0.75 * start[key] + 0.25 * a[key]
        torch.testing.assert_close(out[key], expected, atol=1e-6, rtol=1e-5)


def test_continued_runs_have_a_start_in_common(tmp_path: Path) -> None:
    method = "adaptformer:bottleneck=4"
    start = adapter(tmp_path / "start", method, 9)
    paths = [adapter(tmp_path / str(seed), method, seed, start=start) for seed in (0, 1)]
    done = petune.average_adapters(paths, tmp_path / "mean")
    assert done.notes == ()
    petune.average_adapters(paths, tmp_path / "out", algorithm="task_arithmetic", coefficients=[0.5, 0.25])
    zero, a, b, out = (tensors(path) for path in (start, *paths, tmp_path / "out"))
    for key in (key for key in out if not is_head(key)):
        expected = zero[key] + 0.5 * (a[key] - zero[key]) + 0.25 * (b[key] - zero[key])
        torch.testing.assert_close(out[key], expected, atol=1e-6, rtol=1e-5)
    moved = start.rename(tmp_path / "moved")
    with pytest.raises(petune.UsageError, match=r"no longer at .*start='DIR'"):
        petune.average_adapters(paths, tmp_path / "again", algorithm="wise_ft")
    petune.average_adapters(paths, tmp_path / "again", algorithm="wise_ft", start=moved)
    with pytest.raises(petune.UsageError, match="another SHA-256"):
        petune.average_adapters(paths, tmp_path / "wrong", algorithm="wise_ft", start=paths[0])


def written_out_ties(vectors: Tensor, density: float) -> Tensor:
    """TIES of the rows, as in the authors' code: trim each, elect signs, mean of those that agree."""
    count = vectors.shape[1]
    limit = vectors.abs().kthvalue(count - int(count * density), dim=1, keepdim=True).values
    trimmed = vectors * (vectors.abs() >= limit)
    sign = trimmed.sum(0).sign()
    sign[sign == 0] = sign.sum().sign()
    agreeing = torch.where(sign > 0, trimmed > 0, trimmed < 0)
    return (trimmed * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)


def test_ties_of_lora(tmp_path: Path) -> None:
    """The start of LoRA is no change, whatever the seed."""
    paths = [adapter(tmp_path / str(seed), "lora:r=2", seed) for seed in (0, 1, 2)]
    petune.average_adapters(paths, tmp_path / "out", algorithm="ties", density=0.3)
    each, result = [changes(path) for path in paths], changes(tmp_path / "out")
    layers = list(result)
    flat = torch.stack([torch.cat([c[layer].flatten() for layer in layers]) for c in each])
    merged = torch.cat([result[layer].flatten() for layer in layers])
    torch.testing.assert_close(merged, written_out_ties(flat, 0.3), atol=1e-6, rtol=1e-4)


def test_dare_keeps_a_share(tmp_path: Path) -> None:
    paths = [adapter(tmp_path / str(n), "bitfit", seed) for n, seed in enumerate((0, 1))]
    for name, seed in (("out", 3), ("same", 3), ("other", 4)):
        petune.average_adapters(paths, tmp_path / name, algorithm="dare", coefficients=[1, 0], density=0.25, seed=seed)
    start, a, out = fresh("bitfit", 0, tmp_path), tensors(paths[0]), tensors(tmp_path / "out")
    kept = total = 0
    for key in (key for key in out if not is_head(key)):
        change, full = out[key] - start[key], (a[key] - start[key]) / 0.25
        is_kept = change.abs() > 1e-5
        torch.testing.assert_close(change[is_kept], full[is_kept], atol=1e-5, rtol=1e-4)
        kept, total = kept + int(is_kept.sum()), total + change.numel()
    assert 0.2 < kept / total < 0.3
    assert (tmp_path / "out" / FILE).read_bytes() == (tmp_path / "same" / FILE).read_bytes()
    assert (tmp_path / "out" / FILE).read_bytes() != (tmp_path / "other" / FILE).read_bytes()


def test_statistics_of_batch_norm(tmp_path: Path) -> None:
    paths = []
    for seed in (0, 1):
        made = backbone(head="bn_linear")
        att = petune.attach(made.model, "bitfit")
        norm = next(m for m in made.model.modules() if isinstance(m, nn.BatchNorm1d))
        for _ in range(1 + seed):
            norm.train()(torch.randn(8, NANO["embed_dim"], generator=torch.Generator().manual_seed(seed)))
        said = card(made, "vit_nano", dict(NANO))
        said["backbone"] = {**said["backbone"], "head": "bn_linear"}  # type: ignore[dict-item]
        att.save(tmp_path / str(seed), metadata=said)
        paths.append(tmp_path / str(seed))
    done = petune.average_adapters(paths, tmp_path / "out")
    assert "statistics" in done.notes[0]
    a, b, out = (tensors(path) for path in (*paths, tmp_path / "out"))
    count = next(key for key in out if key.endswith("num_batches_tracked"))
    mean = next(key for key in out if key.endswith("running_mean"))
    assert int(out[count]) == 2
    torch.testing.assert_close(out[mean], (a[mean] + b[mean]) / 2)


def test_heads_of_other_classes(tmp_path: Path) -> None:
    a, b = (adapter(tmp_path / str(seed), "bitfit", seed) for seed in (0, 1))
    b = changed(b, tmp_path / "b", classes=["x", "y", "z"])
    with pytest.raises(petune.UsageError, match=r"other classes .*head='DIR'"):
        petune.average_adapters([a, b], tmp_path / "out")
    petune.average_adapters([a, b], tmp_path / "out", head=b)
    kept, out = tensors(b), tensors(tmp_path / "out")
    assert all(torch.equal(out[key], kept[key]) for key in out if is_head(key))
    assert petune.Predictor(tmp_path / "out", device="cpu").classes == ("x", "y", "z")
    petune.average_adapters([a, b], tmp_path / "none", head="none")
    assert not any(is_head(key) for key in tensors(tmp_path / "none"))
    made = backbone(num_classes=7, initial_classes=3)
    att = petune.load(made.model, tmp_path / "none")  # any classifier
    assert made.model.eval()(X).shape == (2, 7)
    assert not att.head
    with pytest.raises(petune.CheckpointError, match="has no classifier"):
        petune.Predictor(tmp_path / "none")


def test_an_own_model(tmp_path: Path) -> None:
    from tests.tiny import tiny, trained

    att = petune.attach(tiny(), "adaptformer", bottleneck=4)
    for number in (0, 1):
        trained(att).save(tmp_path / str(number))
    paths = [tmp_path / "0", tmp_path / "1"]
    with pytest.raises(petune.CheckpointError, match="does not record its backbone"):
        petune.average_adapters(paths, tmp_path / "out")
    petune.average_adapters(paths, tmp_path / "out", model=tiny())
    petune.load(tiny(), tmp_path / "out")
    with pytest.raises(petune.UsageError, match=r"does not record the seed.*start='DIR'"):
        petune.average_adapters(paths, tmp_path / "again", model=tiny(), algorithm="wise_ft")


def test_another_backbone(tmp_path: Path) -> None:
    a, b = adapter(tmp_path / "a", "bitfit", 0), adapter(tmp_path / "b", "bitfit", 1, weights_seed=3)
    with pytest.raises(petune.BackboneMismatch, match="other weights"):
        petune.average_adapters([a, b], tmp_path / "out")


def test_a_seed_that_draws_other_values(tmp_path: Path) -> None:
    """As after a training on a GPU, whose generator draws other numbers."""
    method = "adaptformer:bottleneck=4"
    paths = [adapter(tmp_path / str(seed), method, seed) for seed in (0, 1)]
    paths = [changed(path, tmp_path / f"x{path.name}", training={"seed": 5}) for path in paths]
    with pytest.raises(petune.UsageError, match="do not resemble"):
        petune.average_adapters(paths, tmp_path / "out", algorithm="task_arithmetic")


def test_constants_have_no_average(tmp_path: Path) -> None:
    """VeRA's projections are drawn by a key: adapters of two keys have nothing in common."""
    paths = [adapter(tmp_path / str(n), f"peft:vera,r=2,projection_prng_key={n}", n) for n in (0, 1)]
    with pytest.raises(petune.UsageError, match="projection_prng_key"):
        petune.average_adapters(paths, tmp_path / "out")


def test_lora_of_other_ranks_and_scales(tmp_path: Path) -> None:
    methods = ["lora:r=2", "lora:r=3,lora_alpha=5", "lora:r=1,lora_alpha=4"]
    paths = [adapter(tmp_path / str(seed), method, seed) for seed, method in enumerate(methods)]
    parts = [changes(path) for path in paths]
    done = petune.average_adapters(paths[:2], tmp_path / "out")
    assert done.rank == 5
    for layer, change in changes(tmp_path / "out").items():
        torch.testing.assert_close(change, (parts[0][layer] + parts[1][layer]) / 2, atol=1e-5, rtol=1e-4)
    grown = petune.average_adapters([tmp_path / "out", paths[2]], tmp_path / "grown", coefficients=[2, 1])
    assert grown.rank == 6
    for layer, change in changes(tmp_path / "grown").items():
        expected = sum(part[layer] for part in parts) / 3
        torch.testing.assert_close(change, expected, atol=1e-5, rtol=1e-4)
    petune.Predictor(tmp_path / "grown", device="cpu")  # checks the reference logits
    with pytest.raises(petune.UsageError, match="without by_factors"):
        petune.average_adapters(paths, tmp_path / "factors", by_factors=True)


def test_a_start_of_another_rank(tmp_path: Path) -> None:
    start = adapter(tmp_path / "start", "lora:r=3,lora_alpha=5", 0)
    last = adapter(tmp_path / "last", "lora:r=2", 1)
    metadata = config(last)["metadata"]
    made = backbone()
    att = petune.load(made.model, last)
    earlier = [{"path": str(start), "sha256": sha(start), "dataset": None, "epochs": 1}]
    att.save(tmp_path / "continued", metadata={**metadata, "continued_from": earlier})
    petune.average_adapters([tmp_path / "continued"], tmp_path / "out", algorithm="wise_ft", coefficients=[0.25])
    before, after = changes(start), changes(last)
    for layer, change in changes(tmp_path / "out").items():
        torch.testing.assert_close(change, 0.75 * before[layer] + 0.25 * after[layer], atol=1e-5, rtol=1e-4)


def test_without_a_classifier(tmp_path: Path) -> None:
    paths = [adapter(tmp_path / str(seed), "bitfit", seed) for seed in (0, 1)]
    done = petune.average_adapters(paths, tmp_path / "out", head="none")
    assert "no classifier" in " ".join(done.notes)
    with pytest.raises(petune.CheckpointError, match="has no classifier"):
        petune.Predictor(tmp_path / "out", device="cpu")


@pytest.mark.parametrize("options", ["r=2,lora_alpha=4", "r=2,lora_alpha=4,use_rslora=true"])
def test_lora_of_q_and_v_in_one_layer(options: str, tmp_path: Path) -> None:
    paths = [adapter(tmp_path / str(seed), f"lora:targets=[q,v],{options}", seed) for seed in (0, 1)]
    for rank in (None, 1):
        done = petune.average_adapters(paths, tmp_path / f"rank{rank}", rank=rank)
        assert (done.rank, tensors(tmp_path / f"rank{rank}")[LORA_A].shape[0]) == (rank or 8, rank or 8)
        assert (done.largest_error or 0) < 1e-6 if rank is None else 0.1 < (done.largest_error or 0) < 1
    expected = sum(merged_change(path) for path in paths) / 2
    torch.testing.assert_close(merged_change(tmp_path / "rankNone"), expected, atol=1e-6, rtol=1e-4)
    error = (merged_change(tmp_path / "rank1") - expected).norm() / expected.norm()
    assert error == pytest.approx(done.errors["base_model.model.blocks.0.attn.qkv"], abs=1e-4)
    assert config(tmp_path / "rank1")["metadata"]["method"].startswith("lora:target_modules=[blocks.0.attn.qkv]")
    again = petune.average_adapters([tmp_path / "rankNone", tmp_path / "rank1"], tmp_path / "again")
    assert again.rank == 8
    petune.average_adapters(paths, tmp_path / "factors", by_factors=True)


LORA_A = "base_model.model.blocks.0.attn.qkv.lora_A.weight"


def merged_change(path: Path) -> Tensor:
    """Return the change of the qkv weight when an adapter is merged."""
    plain, tuned = backbone().model, backbone().model
    petune.load(tuned, path).merge()
    key = "blocks.0.attn.qkv.weight"
    return tuned.state_dict()[key] - plain.state_dict()[key]


def test_the_average_is_on_the_model_afterwards(tmp_path: Path) -> None:
    paths = [adapter(tmp_path / str(seed), "adaptformer:bottleneck=4", seed) for seed in (0, 1)]
    model, loaded = backbone().model, backbone().model
    notes = petune.average_adapters(paths, tmp_path / "out", model=model).notes
    assert "different random values" in " ".join(notes)
    petune.load(loaded, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(model.eval()(X), loaded.eval()(X))
