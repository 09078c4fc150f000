"""What all tests share."""

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# PEFT's BOFT imports setuptools, which fails once anything (transformers, triton) has imported Python's own distutils.
import setuptools  # noqa: F401

SLOW = {
    "adapters/test_reference_logits.py", "adapters/test_migrations.py", "injector/test_loop_check.py",
    "injector/test_attachment.py", "injector/test_compiled.py", "faults/test_calls.py", "cli/test_main.py",
    "test_public.py", "test_peers.py", "cli/test_dry_run.py", "serving/test_adapter_bank.py",
    "data/test_table_runs.py", "serving/test_predictions.py",
    "serving/test_golden.py", "tuners/test_contract.py", "base/test_config.py", "backbones/test_weights.py",
    "families/test_formulas.py", "families/test_left_as_it_was.py", "tuners/test_formulas.py",
    "base/test_distributed.py", "cli/test_compare.py", "cli/test_eval.py", "cli/test_export.py", "cli/test_inspect.py",
    "cli/test_predict.py", "cli/test_pretrain.py", "cli/test_report.py", "cli/test_run.py", "cli/test_sweep.py",
    "cli/test_trust.py", "data/test_manifest.py", "families/test_page.py", "faults/test_asked_to_stop.py",
    "faults/test_corrupted.py", "faults/test_full_disk.py", "faults/test_hostile.py", "faults/test_killed.py",
    "faults/test_promises.py", "faults/test_together.py", "injector/test_attach.py", "injector/test_peft_type.py",
    "plugin_dev/test_check_command.py", "plugin_dev/test_isolation.py", "plugin_dev/test_new.py",
    "runner/test_executors.py", "runner/test_migrations.py", "runner/test_provenance.py", "runner/test_ray.py",
    "runner/test_run_inputs.py", "runner/test_sweep_elsewhere.py", "sites/test_final_norm.py",
    "sites/test_handwritten_models.py", "sites/test_undisturbed.py", "sites/test_unusual_models.py",
    "test_docs.py", "test_examples.py", "test_notebook.py", "test_results.py", "test_speed.py", "test_suites.py",
    "test_wheel.py", "training/speed/test_feature_cache.py", "training/speed/test_onednn_linear.py",
    "training/speed/test_speedups.py", "training/test_memory.py", "training/test_resume.py", "tuners/test_adalora.py",
    "tuners/test_merging.py", "tuners/test_parity.py", "tuners/test_peft.py", "tuners/test_peft_harness.py",
    "tuners/test_peft_stacked.py",
    "training/tasks/test_task_runs.py", "tuners/test_several.py", "tuners/test_transforms.py",
}  # fmt: skip
"""Files that train, start processes, or go through many models; `make quick` leaves them out."""
BROWSER = {"runner/test_pages_in_browser.py", "serving/test_demo.py"}
NETWORK = {"base/test_hub.py", "backbones/test_other_libraries.py", "serving/test_share.py"}
FIRST = ("plugins/", "tests/faults/", "tests/tuners/")
"""Files that take long start first, so that neither of two processes works alone at the end."""
HERE = Path(__file__).parent


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Leave modules and tests, which stay to the end, out of garbage collection: that takes a tenth of all time."""
    import hypothesis  # noqa: F401  # at its import it looks for objects that freeze() hides

    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_sessionfinish() -> None:
    """Undo the above: hypothesis looks for referrers when it is imported for the summary."""
    gc.unfreeze()


def pytest_configure() -> None:
    """Check that the listed files exist: a slow file that was renamed would join `make quick` without a word."""
    missing = [name for name in {*SLOW, *BROWSER, *NETWORK} if not (HERE / name).is_file()]
    assert not missing, f"tests/conftest.py lists files that do not exist: {sorted(missing)}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their file: `slow`, `browser`, `network`. Put long files first."""
    items.sort(key=lambda item: (not item.nodeid.startswith(FIRST), _name_of(item) not in SLOW))
    for item in items:
        name = _name_of(item)
        for marker, files in (("slow", {*SLOW, "plugins"}), ("browser", BROWSER), ("network", NETWORK)):
            if name in files:
                item.add_marker(marker)


def _name_of(item: pytest.Item) -> str:
    return item.path.relative_to(HERE).as_posix() if item.path.is_relative_to(HERE) else "plugins"


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Restore the number of threads: with two in each of two processes, all later tests take ten times as long."""
    before = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    yield
    if before is not None and sys.modules["torch"].get_num_threads() != before:
        sys.modules["torch"].set_num_threads(before)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a finished run of AdaptFormer on digits. Read it, do not write to it."""
    from petune.runner.run import run

    place = tmp_path_factory.mktemp("digits") / "run"
    run(
        method="adaptformer:bottleneck=4",
        backbone="vit_nano",
        weights="none",
        backbone_options={"depth": 2, "embed_dim": 48},
        dataset="digits",
        shots=20,
        device="cpu",
        train={"epochs": 1, "precision": "fp32", "lr": 0.01},
        output=place,
    )
    return place
