"""Which images a gallery shows, against cases worked by hand."""

import numpy as np
import pytest

from jaxcats.evaluate.ranking import (
    knn_outlier_score,
    label_errors,
    most_by_correct,
    most_uncertain,
    rand_by_correct,
    top_losses,
)

# Rows: probability of cats, dogs.       right?  margin
TWO = np.log([
    [0.90, 0.10],  # 0 cat, said cat       yes   .80
    [0.30, 0.70],  # 1 cat, said dog       no    .40
    [0.55, 0.45],  # 2 cat, said cat       yes   .10
    [0.20, 0.80],  # 3 dog, said dog       yes   .60
    [0.95, 0.05],  # 4 dog, said cat       no    .90
    [0.49, 0.51],  # 5 dog, said dog       yes   .02
    [0.10, 0.90],  # 6 cat, said dog       no    .80
    [0.20, 0.80],  # 7 dog, said dog       yes   .60
])  # fmt: skip
LABELS = np.array([0, 0, 0, 1, 1, 1, 0, 1])
THREE = np.log([[0.5, 0.3, 0.2], [0.2, 0.41, 0.39], [0.1, 0.1, 0.8], [0.34, 0.33, 0.33]])


@pytest.mark.parametrize(
    ("index", "correct", "rows"),
    [(0, True, [0, 2]), (0, False, [6, 1]), (1, True, [3, 7, 5]), (1, False, [4])],
)
def test_most_right_and_most_wrong_of_a_class(index, correct, rows):
    assert most_by_correct(TWO, LABELS, index, correct, n=4).tolist() == rows
    assert most_by_correct(TWO, LABELS, index, correct, n=1).tolist() == rows[:1]


def test_most_by_correct_of_three_classes():
    labels = np.array([1, 1, 1, 1])
    assert most_by_correct(THREE, labels, 1, False, n=4).tolist() == [2, 0, 3]  # the least probable first
    assert most_by_correct(THREE, labels, 1, True, n=4).tolist() == [1]
    assert most_by_correct(THREE, labels, 0, True, n=4).tolist() == []


def test_the_least_sure():
    assert most_uncertain(TWO).tolist() == [5, 2, 1, 3]
    lesson = np.argsort(np.abs(np.exp(TWO[:, 1]) - 0.5).round(12), kind="stable")  # the lesson's |p - 0.5|
    assert most_uncertain(TWO, n=8)[:6].tolist() == lesson[:6].tolist()
    assert most_uncertain(THREE, n=9).tolist() == [3, 1, 0, 2]  # .34 - .33, .41 - .39, .5 - .3, .8 - .1


def test_the_highest_losses():
    assert top_losses(TWO, LABELS).tolist() == [4, 6, 1, 5, 2, 3, 7, 0]
    assert top_losses(TWO, LABELS, n=2).tolist() == [4, 6]


def test_random_ones_are_right_or_wrong_as_asked_and_repeat():
    assert sorted(rand_by_correct(TWO, LABELS, False, n=9).tolist()) == [1, 4, 6]
    right = [tuple(rand_by_correct(TWO, LABELS, True, n=3, seed=s).tolist()) for s in range(20)]
    assert right[3] == tuple(rand_by_correct(TWO, LABELS, True, n=3, seed=3).tolist())
    assert len(set(right)) > 5
    assert {row for rows in right for row in rows} == {0, 2, 3, 5, 7}
    assert all(len(set(rows)) == 3 for rows in right)


def test_no_rows_give_no_rows():
    none = np.zeros((0, 2)), np.zeros(0, int)
    for found in (
        rand_by_correct(*none, True, n=4),
        most_by_correct(*none, 0, True, n=4),
        most_uncertain(none[0]),
        top_losses(*none),
    ):
        assert found.shape == (0,)
        assert found.dtype == np.int64


def test_labels_that_look_wrong():
    assert label_errors(TWO, LABELS, most=1).tolist() == [4, 6, 1]  # all wrong ones, the most confident first
    # All the same where the network is as sure as it usually is of that class: .54 of dogs, .4625 of cats.
    assert label_errors(TWO, LABELS, most=0).tolist() == [4, 6, 1]
    unsure = np.log([[0.9, 0.1], [0.4, 0.6], [0.1, 0.9]])
    assert label_errors(unsure, np.array([0, 0, 1]), most=0).tolist() == []
    assert label_errors(np.log([[0.9, 0.1], [0.1, 0.9]]), np.array([0, 1])).tolist() == []


def test_a_class_without_images_can_be_suggested_but_not_surely():
    assert label_errors(THREE, np.array([0, 1, 1, 0]), most=1).tolist() == [2]
    assert label_errors(THREE, np.array([0, 1, 1, 0]), most=0).tolist() == []


def test_the_strangest_image_is_the_one_without_neighbours():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2, 64))[np.arange(60) % 2] + 0.3 * rng.normal(size=(60, 64))
    features[:, 7] = 3  # a feature that says nothing
    features[55] = rng.normal(size=64)
    hashes = [str(i) for i in range(60)]
    found = knn_outlier_score(features, hashes, known=50)
    assert found.shape == (60,)
    assert np.isfinite(found).all()
    assert found.argmax() == 55
    # As it is for a training image, whose own place doesn't count; nor do its copies.
    turned = np.roll(np.arange(60), 20)
    assert knn_outlier_score(features[turned], [hashes[i] for i in turned], known=50).argmax() == turned.tolist().index(
        55
    )
    copied = features[[*range(50), 55, 55, 55]]
    found = knn_outlier_score(copied, [*hashes[:50], "55", "55", "55"], known=53, k=1)
    assert set(found.argsort()[-3:].tolist()) == {50, 51, 52}


def test_few_training_images_still_have_neighbours():
    found = knn_outlier_score(np.eye(4, 3), ["a", "b", "c", "c"], known=3)
    assert np.isfinite(found).all()
