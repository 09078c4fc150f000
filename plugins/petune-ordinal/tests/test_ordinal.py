"""The ordinal task meets petune's contract, and computes CORN's loss."""

import pytest
import torch
from petune_ordinal import Ordinal, ranks

import petune


def test_contract():
    petune.check_task("ordinal")


def test_the_loss_is_that_of_the_paper():
    outputs = torch.tensor([[0.3, -1.2, 2.0]])
    log_p, log_q = outputs.sigmoid().log()[0], (-outputs).sigmoid().log()[0]
    expected = {0: -log_q[0], 1: -(log_p[0] + log_q[1]), 2: -(log_p[0] + log_p[1] + log_q[2]), 3: -log_p.sum()}
    for label, loss in expected.items():
        assert Ordinal().loss(outputs, torch.tensor([label])).item() == pytest.approx(loss.item())


def test_a_rank_needs_all_borders_below_it():
    assert ranks(torch.tensor([[9.0, -9.0, 9.0], [9.0, 9.0, 9.0], [-9.0, 9.0, 9.0]])).tolist() == [1, 3, 0]


@pytest.mark.exhaustive
def test_a_run_chooses_the_epoch_by_the_error(tmp_path):
    result = petune.run(
        task="ordinal", method="linear", backbone="vit_nano", dataset="digits", shots=10, output=tmp_path / "run",
        train={"epochs": 2, "precision": "fp32"},
    )  # fmt: skip
    assert [metric.name for metric in result.metric_info] == ["mae", "kappa", "top1"]
    assert 0 < result.metrics["mae"] < 4.5
