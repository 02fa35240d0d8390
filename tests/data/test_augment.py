"""Augmentation: each operation against a computation of another kind, how often, and of what it may not depend on."""

import dataclasses
import functools
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from jaxcats.data.augment import (
    PRESETS,
    Augmentation,
    Draw,
    affine,
    draw,
    make_augment,
    relight,
    sample,
    source_preprocess,
)
from jaxcats.data.images import Preprocess, evaluation_pixels

KEY = jax.random.key(3)
SIDE, SIZE, N = 37, 32, 4000
ALL = dataclasses.replace(PRESETS["side_on"], dihedral=True)
FIELDS = {  # of a Draw, by the operation that fills them
    "dihedral": ("transpose", "rows", "columns"),
    "zoom": ("zoom",),
    "crop": ("place",),
    "rotate": ("angle",),
    "lighting": ("brightness", "contrast"),
}


def noise(n: int, side: int, seed: int = 0) -> np.ndarray:
    """Images of which none is another's mirror image, so that what was done to each can be told."""
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), np.uint8)


def smooth(photo, side: int, seed: int = 1) -> np.ndarray:
    return np.asarray(photo(seed, side, side))


def rows(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.int32)


def draws(how: Augmentation, n: int = N, *, key=KEY, epoch=0) -> dict[str, np.ndarray]:
    """The choices for rows 0 to n; not compiled as a whole, so that all tests share the small programs of its parts."""
    return {k: np.asarray(v)[:n] for k, v in draw(how, key=key, epoch=epoch, index=rows(N))._asdict().items()}


def source_size(how: Augmentation | None, size: int) -> int:
    return source_preprocess(Preprocess(size=size), how).size


def source_of(how: Augmentation | None, size: int = SIZE, n: int = 24) -> np.ndarray:
    return noise(n, source_size(how, size))


@functools.cache
def compiled(how: Augmentation, size: int):
    """Shared by the tests, since most of their time is compilation."""
    return jax.jit(make_augment(how, key=KEY, size=size))


def augmented(how: Augmentation, images: np.ndarray, index=None, *, epoch=0, size=SIZE) -> np.ndarray:
    return np.asarray(compiled(how, size)(images, epoch, rows(len(images)) if index is None else index))


NEUTRAL = {"transpose": False, "rows": False, "columns": False, "zoom": 1.0, "place": (0.5, 0.5), "angle": 0.0}
seen_through = jax.jit(
    lambda images, d, size: sample(images, *affine(d, side=images.shape[1], size=size), size=size), static_argnums=2
)


def sampled(image: np.ndarray, size: int, **choices) -> np.ndarray:
    """One image through the affine map of the given choices, the others neutral."""
    d = Draw(**{k: jnp.asarray([v]) for k, v in (NEUTRAL | choices).items()}, brightness=0, contrast=0)
    return np.asarray(seen_through(image[None].astype(np.float32), d, size)[0])


# --- presets and sizes


def test_the_presets():
    assert list(PRESETS) == ["none", "flip", "crop", "side_on", "top_down"]
    assert PRESETS["none"] is None
    basic = {"crop": True, "zoom": 8 / 7, "rotate": 10, "lighting": 0.05, "p": 0.75}
    assert PRESETS["flip"] == Augmentation(flip=True)
    assert PRESETS["crop"] == Augmentation(crop=True, zoom=8 / 7)
    assert PRESETS["side_on"] == Augmentation(flip=True, **basic)
    assert PRESETS["top_down"] == Augmentation(dihedral=True, **basic)


def test_the_source_is_larger_only_where_a_window_is_cut():
    assert [source_size(how, 224) for how in PRESETS.values()] == [224, 224, 256, 256, 256]
    assert source_size(Augmentation(rotate=10, lighting=0.2, dihedral=True), 96) == 96
    assert source_size(Augmentation(zoom=1.5), 32) == 37


@pytest.mark.parametrize("policy", ["lesson", "weights"])
def test_the_source_is_the_whole_centre_square(photo, policy):
    preprocess = Preprocess(size=56, policy=policy)
    for name in ("none", "flip"):
        assert source_preprocess(preprocess, PRESETS[name]) == preprocess
    larger = source_preprocess(preprocess, PRESETS["side_on"])
    assert larger == dataclasses.replace(preprocess, size=64, policy="lesson")
    square = photo(1, 200, 100).crop((50, 0, 150, 100)).resize((64, 64), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(evaluation_pixels(photo(1, 200, 100), larger), np.asarray(square), atol=2)


@pytest.mark.parametrize(("policy", "z"), [("lesson", 1), ("weights", 8 / 7)])
def test_one_window_frames_what_evaluation_frames(photo, policy, z):
    """As the docstring of source_preprocess says; Pillow's resize is smoother, so the two are only close."""
    preprocess = Preprocess(size=56, policy=policy)
    source = evaluation_pixels(photo(1, 200, 100), source_preprocess(preprocess, PRESETS["crop"]))
    expected = evaluation_pixels(photo(1, 200, 100), preprocess)
    errors = {w: np.abs(sampled(source, 56, zoom=w) - expected).mean() for w in (1, 1.05, 1.1, 8 / 7, 1.2)}
    assert min(errors, key=errors.__getitem__) == z
    assert errors[z] < 2


# --- each operation against another way of computing it


def test_with_everything_off_images_stay_or_are_plainly_resized():
    images = noise(3, SIDE)
    kept = augmented(Augmentation(), images, size=SIDE)
    np.testing.assert_array_equal(kept, images)
    assert kept.dtype == np.uint8
    plain = jax.image.resize(images.astype(np.float32), (3, SIZE, SIZE, 3), "bilinear", antialias=False)
    np.testing.assert_allclose(augmented(Augmentation(), images), plain, atol=0.01)


def test_half_are_exact_mirrors_and_the_others_are_untouched():
    images = noise(1000, 4)
    out = augmented(PRESETS["flip"], images, size=4)
    assert out.dtype == np.uint8
    mirrored = draws(PRESETS["flip"], 1000)["columns"]
    np.testing.assert_array_equal(out, np.where(mirrored[:, None, None, None], images[:, :, ::-1], images))
    assert 420 <= mirrored.sum() <= 580


EIGHT = [lambda x, k=k, m=m: np.rot90(x[:, ::-1] if m else x, k) for k in range(4) for m in (False, True)]


def test_dihedral_gives_each_of_the_eight_symmetries_as_often():
    images = noise(1600, 4)
    out = augmented(Augmentation(dihedral=True), images, size=4)
    assert out.dtype == np.uint8
    found = [[np.array_equal(o, turn(x)) for turn in EIGHT] for x, o in zip(images, out, strict=True)]
    assert np.sum(found, 1).tolist() == [1] * 1600
    assert (np.abs(np.sum(found, 0) - 200) < 60).all()


@pytest.mark.parametrize("number", range(8))
def test_symmetries_are_the_same_whether_moved_or_sampled(number):
    (image,) = noise(1, 9)
    transpose, flip_rows, flip_columns = (bool(number & bit) for bit in (1, 2, 4))
    expected = image.swapaxes(0, 1) if transpose else image
    expected = expected[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
    out = sampled(image, 9, transpose=transpose, rows=flip_rows, columns=flip_columns)
    np.testing.assert_allclose(out, expected, atol=0.01)


@pytest.mark.parametrize("degrees", [10, -33, 90, 135])
@pytest.mark.parametrize("side", [64, 65])
def test_rotation_is_scipys(photo, degrees, side):
    image = smooth(photo, side).astype(np.float64)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix, centre = np.array([[cos, sin], [-sin, cos]]), (side - 1) / 2
    offset = centre - matrix @ [centre, centre]
    expected = np.stack(
        [ndimage.affine_transform(image[..., c], matrix, offset, order=1, mode="reflect") for c in range(3)], -1
    )
    np.testing.assert_allclose(sampled(image, side, angle=math.radians(degrees)), expected, atol=0.05)


def test_positive_angles_turn_counter_clockwise_as_in_pillow(photo):
    image = photo(1, 80, 80)
    expected = np.asarray(image.rotate(20, Image.Resampling.BILINEAR), np.float32)
    out = sampled(np.asarray(image), 80, angle=math.radians(20))
    inside = np.hypot(*(np.indices((80, 80)) - 39.5)) < 38
    assert np.abs(out - expected)[inside].max() < 1.5


@pytest.mark.parametrize("place", [(0, 0), (0.5, 0.5), (1, 0.2)])
@pytest.mark.parametrize("zoom", [1, 1.1, 8 / 7, 2])
def test_the_window_is_pillows(photo, place, zoom):
    side, size = 64, 56
    window = side / zoom
    top, left = (at * (side - window) for at in place)
    box = (left, top, left + window, top + window)
    image = photo(2, side, side)
    expected = image.transform((size, size), Image.Transform.EXTENT, box, Image.Resampling.BILINEAR)
    out = sampled(np.asarray(image), size, zoom=zoom, place=place)
    assert np.abs(out - np.asarray(expected, np.float32))[1:-1, 1:-1].max() < 1.5


def test_all_of_the_geometry_at_once_is_turn_then_cut_then_mirror():
    """Each image followed through its own draws, one operation after the other, in float64."""
    how = dataclasses.replace(PRESETS["top_down"], lighting=0.0, rotate=40, zoom=1.5)
    images = np.stack([ndimage.gaussian_filter(x.astype(float), (2, 2, 0)) for x in noise(24, SIDE)]).astype(np.uint8)
    out, choices = augmented(how, images), draws(how, 24)
    for i, image in enumerate(images):
        d = {k: v[i] for k, v in choices.items()}
        window = SIDE / d["zoom"]
        y, x = np.meshgrid(
            *(at * (SIDE - window) + (np.arange(SIZE) + 0.5) * window / SIZE for at in d["place"]), indexing="ij"
        )
        cos, sin, y, x = math.cos(d["angle"]), math.sin(d["angle"]), y - SIDE / 2, x - SIDE / 2
        at = [cos * y + sin * x + (SIDE - 1) / 2, cos * x - sin * y + (SIDE - 1) / 2]
        cut = [ndimage.map_coordinates(image[..., c].astype(float), at, order=1, mode="reflect") for c in range(3)]
        expected = np.stack(cut, -1)
        expected = expected.swapaxes(0, 1) if d["transpose"] else expected
        expected = expected[:: -1 if d["rows"] else 1, :: -1 if d["columns"] else 1]
        np.testing.assert_allclose(out[i], expected, atol=0.05)


def test_lighting_is_fastais_formula():
    how = Augmentation(lighting=0.3)
    images = source_of(how)
    out, choices = augmented(how, images), draws(how, len(images))
    for i, image in enumerate(images):
        x, b, c = image / 255, choices["brightness"][i], choices["contrast"][i]
        factor = c + 1 if c >= 0 else 1 / (1 - c)
        expected = np.clip((x - x.mean()) * factor + x.mean() + b, 0, 1)
        np.testing.assert_allclose(out[i] / 255, expected, atol=1e-5)
    assert choices["contrast"].min() < 0 < choices["contrast"].max()


def test_lighting_turns_about_the_mean_of_the_image_in_all_channels():
    image = np.zeros((1, 4, 4, 3), np.float32) + np.array([0, 100, 200], np.float32)
    out = relight(image, jnp.array([100.0]), jnp.array([0.0]), jnp.array([0.5]))
    np.testing.assert_allclose(out[0, 0, 0], [0, 100, 250], atol=1e-3)


@pytest.mark.parametrize("name", ["crop", "side_on", "top_down"])
def test_no_border_is_invented(name):
    """An image of one colour stays so, however it is turned and cut; outputs stay within 0 to 255."""
    how, images = PRESETS[name], source_of(PRESETS[name])
    one_colour = augmented(how, np.full_like(images, 200))
    assert np.ptp(one_colour, axis=(1, 2, 3)).max() < 1e-3
    out = augmented(how, np.where(images < 128, 0, 255).astype(np.uint8))
    assert out.shape == (24, SIZE, SIZE, 3)
    assert (out.min(), out.max()) == (0, 255)


# --- how often and how much


def test_choices_are_spread_as_said():
    d = draws(dataclasses.replace(PRESETS["top_down"], zoom=1.4, rotate=20, lighting=0.1))

    def uniform(values, low, high):
        assert low <= values.min() <= values.max() <= high
        counts, _ = np.histogram(values, 10, (low, high))
        assert (np.abs(counts / len(values) - 0.1) < 0.025).all()

    uniform(d["zoom"], 1, 1.4)
    uniform(d["place"][:, 0], 0, 1)
    uniform(d["place"][:, 1], 0, 1)
    for name, most in (("angle", math.radians(20)), ("brightness", 0.1), ("contrast", 0.1)):
        changed = d[name] != 0
        assert abs(changed.mean() - 0.75) < 0.03
        uniform(d[name][changed], -most - 1e-6, most + 1e-6)
    columns = [d["zoom"], *d["place"].T, *(d[k] for k in ("angle", "brightness", "contrast", "rows", "columns"))]
    correlations = np.corrcoef(np.stack(columns)) - np.eye(len(columns))
    assert np.abs(correlations).max() < 0.08


@pytest.mark.parametrize(("p", "share"), [(0, 0), (1, 1)])
def test_p_is_the_share_of_images_turned_and_lit(p, share):
    d = draws(dataclasses.replace(PRESETS["side_on"], p=p))
    for name in ("angle", "brightness", "contrast"):
        assert (d[name] != 0).mean() == share
    assert (d["zoom"] != 1).mean() > 0.9


def test_windows_lie_within_the_source_and_reach_its_corners():
    how = dataclasses.replace(PRESETS["crop"], zoom=1.3)
    matrix, shift = affine(Draw(**draws(how)), side=SIDE, size=SIZE)
    edges = np.array([-SIZE / 2, SIZE / 2])
    low, high = (np.einsum("bij,j->bi", matrix, np.full(2, e)) + shift for e in edges)
    assert -1e-3 <= low.min() + SIDE / 2 < 0.05
    assert -1e-3 <= SIDE / 2 - high.max() < 0.05
    sides = (high - low)[:, 0]
    assert sides.min() == pytest.approx(SIDE / 1.3, rel=0.01)
    assert sides.max() == pytest.approx(SIDE, rel=0.01)
    assert (draws(Augmentation(zoom=1.3), 9)["place"] == 0.5).all()


# --- what the choices depend on


@pytest.mark.parametrize("name", ["flip", "top_down"])
def test_an_image_is_changed_alike_whatever_its_batch(name):
    """A resumed epoch, another driver or another batch size must show the same image the same way."""
    how, images = PRESETS[name], source_of(PRESETS[name])
    whole = augmented(how, images)
    assert np.mean([np.array_equal(a, b) for a, b in zip(whole, images, strict=True)]) < 0.8
    order = np.random.default_rng(1).permutation(rows(24))
    np.testing.assert_array_equal(augmented(how, images[order], order), whole[order])
    parts = [augmented(how, images[at : at + 5], rows(24)[at : at + 5]) for at in range(0, 20, 5)]
    np.testing.assert_array_equal(np.concatenate(parts), whole[:20])
    np.testing.assert_array_equal(augmented(how, images[7:8], rows(24)[7:8]), whole[7:8])


def test_compiled_or_not_and_under_vmap():
    """Compilers round differently: without one, up to a hundredth of a grey level."""
    how, images = PRESETS["top_down"], source_of(PRESETS["top_down"], n=5)
    augment, expected = make_augment(how, key=KEY, size=SIZE), augmented(how, images, epoch=2)
    np.testing.assert_allclose(augment(images, 2, rows(5)), expected, atol=0.02)
    epochs = jax.jit(jax.vmap(augment, (None, 0, None)))(images, np.arange(3), rows(5))
    np.testing.assert_allclose(epochs[2], expected, atol=0.02)
    assert np.abs(epochs[1] - expected).mean() > 10


@pytest.mark.parametrize("other", [{"epoch": 1}, {"key": jax.random.key(4)}], ids=["epoch", "key"])
def test_another_epoch_or_key_chooses_anew(other):
    before, after = draws(ALL), draws(ALL, **other)
    for name in ("transpose", "rows", "columns"):
        assert 0.45 <= (before[name] != after[name]).mean() <= 0.55
    for name in ("zoom", "place", "angle", "brightness", "contrast"):
        moved = before[name] - before[name].mean(), after[name] - after[name].mean()
        assert abs(np.mean(moved[0] * moved[1])) < 0.1 * np.std(moved[0]) * np.std(moved[1])


@pytest.mark.parametrize("operation", list(FIELDS))
def test_an_operations_choices_do_not_depend_on_the_others(operation):
    alone = {"zoom": ALL.zoom if operation in ("zoom", "crop") else 1.0, operation: getattr(ALL, operation)}
    all_on, one_on = draws(ALL), draws(Augmentation(**alone))
    for name in FIELDS[operation]:
        np.testing.assert_array_equal(one_on[name], all_on[name])
    for other in set(FIELDS) - {operation, "zoom"}:
        for name in FIELDS[other]:
            assert len(np.unique(one_on[name])) == 1


GOLDEN = {  # side_on with dihedral, seed 0, epoch 1, rows 0 to 2
    "columns": [False, True, True],
    "zoom": [1.0882506, 1.1022276, 1.0641413],
    "place": [[0.6016523, 0.6401677], [0.5981636, 0.8982438], [0.1356516, 0.0723188]],
    "angle": [-0.0747013, -0.0733110, 0.0],
    "brightness": [-0.0371946, -0.0121856, 0.0],
}


def test_the_draws_of_one_key_are_these():
    """If this fails, runs with the same seed no longer repeat those of earlier versions: change it only on purpose."""
    d = draws(ALL, 3, key=jax.random.key(0), epoch=1)
    assert d["columns"].tolist() == GOLDEN["columns"]
    for name in ("zoom", "place", "angle", "brightness"):
        np.testing.assert_allclose(d[name], GOLDEN[name], atol=1e-6)


def test_gradients_pass_through_an_augmented_batch():
    images = source_of(PRESETS["side_on"], n=2)
    augment = make_augment(PRESETS["side_on"], key=KEY, size=SIZE)
    slope = jax.jit(jax.grad(lambda w: (w * augment(images, 0, rows(2))).mean()))(1.0)
    assert slope == pytest.approx(images.mean(), rel=0.1)


def test_two_devices_give_the_bits_of_one():
    code = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxcats.data.augment import PRESETS, make_augment
assert jax.device_count() == 2
images, index = np.random.default_rng(0).integers(0, 256, (8, 37, 37, 3), np.uint8), np.arange(8, dtype=np.int32)
split = NamedSharding(Mesh(jax.devices(), ("data",)), PartitionSpec("data"))
augment = jax.jit(make_augment(PRESETS["top_down"], key=jax.random.key(0), size=32))
program = augment.lower(parts := jax.device_put(images, split), 1, places := jax.device_put(index, split)).compile()
assert not [c for c in ("all-gather", "all-reduce", "all-to-all", "collective-permute") if c in program.as_text()]
out = program(parts, 1, places)
assert out.sharding.spec == split.spec, out.sharding
assert np.array_equal(out, augment(images, 1, index))
print("same bits")
"""
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env)
    assert (done.returncode, done.stdout) == (0, "same bits\n"), done.stderr
