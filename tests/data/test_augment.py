"""Left-right mirroring: how often, of which pictures, and of nothing else."""

import jax
import numpy as np
import pytest

from jaxcats.data.augment import flip

N = 1_000
KEY = jax.random.key(3)
# Noise: no picture is its own mirror image, so what was done to each can be told.
PICTURES = np.random.default_rng(0).integers(0, 256, (N, 4, 6, 3), np.uint8)
ROWS = np.arange(N, dtype=np.int32)


def mirrored(rows=ROWS, *, key=KEY, epoch=0) -> np.ndarray:
    """Which of the pictures with these rows, given as one batch, came back other than they went in."""
    out = np.asarray(flip(key)(PICTURES[rows], epoch, rows))
    return (out != PICTURES[rows]).any((1, 2, 3))


def test_half_are_exact_mirrors_and_the_others_are_untouched():
    out = np.asarray(flip(KEY)(PICTURES, 0, ROWS))
    assert (out.dtype, out.shape) == (np.uint8, PICTURES.shape)
    chosen = mirrored()
    assert 400 <= chosen.sum() <= 600
    np.testing.assert_array_equal(out[chosen], PICTURES[chosen][:, :, ::-1])
    np.testing.assert_array_equal(out[~chosen], PICTURES[~chosen])


def test_the_choice_does_not_depend_on_place_or_size_of_the_batch():
    """A resumed epoch, another driver or another batch size must show the same picture the same way."""
    whole = mirrored()
    shuffled = np.random.default_rng(1).permutation(ROWS)
    np.testing.assert_array_equal(mirrored(shuffled), whole[shuffled])
    parts = [mirrored(ROWS[at : at + 7]) for at in range(0, 70, 7)]
    np.testing.assert_array_equal(np.concatenate(parts), whole[:70])
    np.testing.assert_array_equal([mirrored(ROWS[i : i + 1])[0] for i in range(20)], whole[:20])


def test_the_choice_does_not_depend_on_the_pixels():
    """A row stands for a picture; the same row with other pixels is still mirrored or not."""
    others = PICTURES[::-1]
    out = np.asarray(flip(KEY)(others, 0, ROWS))
    np.testing.assert_array_equal((out != others).any((1, 2, 3)), mirrored())


def test_compiled_and_with_a_traced_epoch_the_choice_is_the_same():
    out = jax.jit(flip(KEY))(PICTURES, np.int32(2), ROWS)
    np.testing.assert_array_equal((np.asarray(out) != PICTURES).any((1, 2, 3)), mirrored(epoch=2))


@pytest.mark.parametrize("other", [{"epoch": 1}, {"key": jax.random.key(4)}], ids=["epoch", "key"])
def test_another_epoch_or_key_chooses_anew(other):
    """Independent choices agree about half of the time: neither the same ones nor their opposites."""
    differ = mirrored(**other) != mirrored()
    assert 400 <= differ.sum() <= 600
