"""The metrics against cases worked by hand."""
import math

import pytest
import torch

from train import scores


def test_three_classes_by_hand():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    row = scores(torch.eye(3)[[0, 0, 0, 1, 1, 0, 2]], labels)
    assert row["confusion"] == [[3, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert row["recall"] == [0.75, 0.5, 1.0]
    assert row["balanced_accuracy"] == pytest.approx((0.75 + 0.5 + 1) / 3)
    assert row["accuracy"] == pytest.approx(5 / 7)
    assert row["macro_f1"] == pytest.approx((6 / 8 + 2 / 4 + 1) / 3)


def test_a_class_absent_from_the_test_set_counts_only_where_it_is_predicted():
    labels = torch.tensor([0, 0, 1, 1])
    # class 2 is predicted once and has no tile, class 3 does not occur at all
    row = scores(torch.eye(4)[[0, 0, 1, 2]], labels)
    assert row["balanced_accuracy"] == pytest.approx((1 + 0.5) / 2)
    assert row["macro_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert math.isnan(row["recall"][2])


def test_two_classes_perfect_and_reversed():
    labels = torch.tensor([0, 1, 1])
    p = torch.tensor([[0.8, 0.2], [0.4, 0.6], [0.1, 0.9]])
    for probabilities, figure in ((p, 1), (1 - p, 0)):
        row = scores(probabilities, labels)
        for key in ("balanced_accuracy", "accuracy", "macro_f1"):
            assert row[key] == figure


def test_one_tile():
    row = scores(torch.tensor([[0.3, 0.7]]), torch.tensor([1]))
    assert row["balanced_accuracy"] == row["accuracy"] == row["macro_f1"] == 1
