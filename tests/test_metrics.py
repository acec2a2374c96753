"""The metrics against cases worked by hand."""
import math

import pytest
import torch
import torch.nn.functional as F

from train import complementarity, scores, text_spread


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


def test_complementarity_counts_what_the_text_model_alone_gets_right_by_class_too():
    labels = torch.tensor([0, 0, 0, 1, 1])
    vision, text = torch.eye(2)[[0, 1, 1, 1, 0]], torch.eye(2)[[1, 0, 1, 0, 1]]
    assert complementarity(vision, text, labels, ["a", "b"]) == {
        "tiles": 2, "share": 2 / 5, "share_of_vision_errors": 2 / 3,
        "per_class": {"a": {"tiles": 1, "share": 1 / 3}, "b": {"tiles": 1, "share": 1 / 2}}}


def test_text_spread_is_one_minus_the_mean_cosine_of_two_reports():
    features = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    cosines = [F.cosine_similarity(features[i], features[j], dim=0).item()
               for i in range(7) for j in range(7) if i != j]
    expected = 1 - sum(cosines) / len(cosines)
    assert text_spread(features) == pytest.approx(expected, abs=1e-6)
    assert text_spread(features[:1].repeat(4, 1)) == pytest.approx(0, abs=1e-6)
