# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Cats or dogs?
#
# The first lesson of fast.ai's 2018 course, from its first line to its last, with jaxcats. You will train a
# classifier of images in three lines, look at what it gets right and wrong, choose a learning rate, and then open
# the box: what a convolution does, what the layers see, where the network looks, and how gradient descent finds its
# weights.
#
# Open this file as a notebook (`jupytext --to notebook scripts/lesson1.py`, or "Open With > Notebook" in JupyterLab
# with jupytext installed), or run it from top to bottom:
#
#     python scripts/lesson1.py [--root FOLDER] [--backbone resnet34] [--out runs/lesson1]
#
# Without `--root` it draws its own cats and dogs, so it needs no download. In a notebook, set the environment
# variables `LESSON1_ROOT`, `LESSON1_BACKBONE`, `LESSON1_OUT`, `LESSON1_SIZE` or `LESSON1_LONG=1` instead, before the
# first cell.

# %%
import argparse
import dataclasses
import itertools
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import demo_images
import jax
import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import optax
from PIL import Image

import jaxcats as jc
from jaxcats.common.stats import wilson_interval
from jaxcats.core.step import normalise
from jaxcats.data.images import evaluation_pixels, open_upright
from jaxcats.evaluate.figures import grad_cam

IN_NOTEBOOK = "ipykernel" in sys.modules
mpl.use("agg")  # figures are drawn once, by `show`


def options() -> argparse.Namespace:
    """The options from the command line, or in a notebook, which has no command line, from the environment."""

    def default(name: str, otherwise: str) -> str:
        return os.environ.get(f"LESSON1_{name}", otherwise)

    parser = argparse.ArgumentParser(description="The fast.ai 2018 lesson 1, with jaxcats.")
    parser.add_argument("--root", default=default("ROOT", ""), help="folder with train/ and valid/; default: drawn")
    parser.add_argument("--backbone", default=default("BACKBONE", "efficientnet_lite0"))
    parser.add_argument("--out", default=default("OUT", "runs/lesson1"), help="where figures and drawn images go")
    parser.add_argument("--size", type=int, default=int(default("SIZE", "224")), help="side of the images in pixels")
    parser.add_argument(
        "--long", action="store_true", default=default("LONG", "") not in ("", "0"), help="part 9 on everything"
    )
    options = parser.parse_args([] if IN_NOTEBOOK else None)
    if options.root and not all(any(Path(options.root).glob(f"{part}/*/*")) for part in ("train", "valid")):
        parser.error(f"--root: {options.root} needs images in train/CLASS/ and in valid/CLASS/")
    return options


def show(figure, name: str) -> None:
    """Saves a figure as OUT/NAME.png and shows it if this is a notebook."""
    path = OUT / f"{name}.png"
    figure.savefig(path, dpi=90)
    plt.close("all")
    if IN_NOTEBOOK:
        from IPython.display import Image as Shown
        from IPython.display import display

        display(Shown(filename=path))
    else:
        print(f"[figure] {path}")


args = options()
OUT = Path(args.out)
OUT.mkdir(parents=True, exist_ok=True)
root = Path(args.root) if args.root else demo_images.draw(OUT / "images", n_train=120, n_valid=120)

# %% [markdown]
# ## 1. Look at the data
#
# The folders are the labels: `train/` is learned from, `valid/` is kept aside to measure how good the result is, and
# inside each there is a folder per class. Some sets also have `test1/`, images without labels.

# %%
for folder in sorted(path for path in root.glob("*/**") if path.is_dir()):
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if files:
        print(f"{folder.relative_to(root)}: {len(files):,} files, such as {', '.join(f.name for f in files[:3])}")
n_train = sum(path.is_file() for path in root.glob("train/*/*"))

# %% [markdown]
# An image is an array: rows, columns, and three numbers from 0 to 255 for the red, green and blue in each place.
# That is all a network gets. Look at a small piece closely enough and the image turns back into numbers.


# %%
def image_as_numbers(image: np.ndarray, *, side: int = 8):
    """Shows the image with a small square marked, the square enlarged, and its red values."""
    steps = np.abs(np.diff(image.astype(float).mean(-1), axis=1))
    blocks = np.lib.stride_tricks.sliding_window_view(steps, (side, side - 1))[::side, ::side].sum((-2, -1))
    top, left = side * np.array(np.unravel_index(blocks.argmax(), blocks.shape))
    piece = image[top : top + side, left : left + side]
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.5), layout="constrained")
    axes[0].imshow(image)
    frame = (left - 0.5, top - 0.5)
    axes[0].add_patch(plt.Rectangle(frame, side, side, fill=False, edgecolor="white", linewidth=3))
    axes[0].add_patch(plt.Rectangle(frame, side, side, fill=False, edgecolor="black", linewidth=1))
    axes[0].set_title(f"an array of shape {image.shape}")
    axes[1].imshow(piece)
    axes[1].set_title(f"the marked {side} x {side} pixels")
    axes[2].imshow(piece[..., 0], cmap="Reds", vmin=0, vmax=400)
    for (row, column), value in np.ndenumerate(piece[..., 0]):
        axes[2].text(column, row, value, ha="center", va="center", fontsize=11)
    axes[2].set_title("their red values")
    for ax in axes:
        ax.axis("off")
    return figure


first = sorted(path for path in root.glob("valid/*/*") if path.is_file())[0]
image = np.asarray(open_upright(first))
print(first.relative_to(root), image.shape, image.dtype)
print(image[:2, :2])
show(image_as_numbers(image), "01_one_image")

# %% [markdown]
# ## 2. Three lines
#
# We don't start from nothing. The *backbone* has already learned to tell a thousand kinds of things apart in
# ImageNet's photos, and what it learned on the way (edges, textures, eyes, fur) serves us too. We keep it as it is
# and train a small new *head* on what it says about each image. With `precompute=True` the backbone looks at every
# image once, and the head learns from these answers in seconds.

# %%
batch_size = 64 if n_train >= 1000 else 16  # a small set in large batches would mean a handful of steps
data = jc.ImageClassifierData.from_paths(root, size=args.size, batch_size=batch_size)
learn = jc.Learner.pretrained(args.backbone, data, precompute=True)
learn.fit(0.01, 3)

# %% [markdown]
# One line per epoch, which is one pass over the training images. The *train loss* says how surprised the model is
# by the labels it learns from, the *valid loss* how surprised it is by images it never learned from: lower is
# better. What you care about are the errors, and how far such a number can be trusted: other validation images
# would have given another number, and the true share of right answers may lie anywhere in the interval.

# %%
RESULTS = [("three lines: head on precomputed features", *learn.errors())]
print(jc.sentence(*learn.errors()))

# %% [markdown]
# ## 3. Look at the predictions
#
# The validation labels are numbers, and `data.classes` says what they stand for. The model answers with one
# log-probability per class; the largest is its guess, and `exp` turns them into probabilities that add up to 1.

# %%
print("data.val_y  ", data.val_y[:5], "...", data.val_y[-5:])
print("data.classes", data.classes)
log_probs = learn.predict()
print("log-probabilities", log_probs.shape)
print(log_probs[:5])
guesses = log_probs.argmax(axis=1)
probs = np.exp(log_probs)
print("guesses", guesses[:10], "probability of", data.classes[1], probs[:10, 1].round(3))

# %% [markdown]
# Numbers hide a lot, so look at images: some right answers, some wrong ones, those it was surest of, those where it
# was surely wrong, and those it could not decide about. Wrong labels and bad photos show up here first. Each title is
# the probability of the second class, and a wrong answer's is in another colour.

# %%
show(learn.plot_val_with_title(learn.rand_by_correct(True), "Right, at random"), "02_random_correct")
show(learn.plot_val_with_title(learn.rand_by_correct(False), "Wrong, at random"), "03_random_incorrect")
for right, word in ((True, "correct"), (False, "incorrect")):
    for name in data.classes[:3]:
        chosen = learn.most_by_correct(name, right)
        show(learn.plot_val_with_title(chosen, f"Most {word} {name}"), f"04_most_{word}_{name}")
show(learn.plot_val_with_title(learn.most_uncertain(), "Most uncertain"), "05_most_uncertain")

# %% [markdown]
# Images without labels are what such a model is for. When there is a `test1/`, these are its first answers.

# %%
if data.test is not None:
    answers = np.exp(learn.predict("test"))
    for path, answer in list(zip(data.test_paths, answers, strict=True))[:5]:
        print(f"{path.name}: {data.classes[answer.argmax()]} ({answer.max():.1%})")

# %% [markdown]
# ## 4. Choose a learning rate
#
# The learning rate says how far each step goes, and it is the number that matters most. Too small, and training takes
# for ever; too large, and it goes wrong. The *range test* (L. Smith, arXiv:1506.01186) finds it by trying: the rate
# grows with each batch from tiny to absurd while we watch the loss. The model is not changed by this. We take a fresh
# one, as you would before its training begins.

# %%
fresh = jc.Learner.pretrained(args.backbone, data, precompute=True)
test = fresh.lr_find()
print(test)
show(fresh.sched.plot_lr(), "06_lr_find_rates")
show(fresh.sched.plot(), "07_lr_find_loss")

# %% [markdown]
# Don't take the rate where the loss is lowest: there it is about to explode. Take one where the loss still falls
# steeply, about a factor ten before the lowest point. There are four known rules for reading it off the curve; `valley`
# is the usual one. One curve is noisy and can lead a rule astray, so the second figure tests eight fresh heads at
# once and shows their median and spread. Where the rules contradict each other, or nothing falls, jaxcats gives no
# number and says why; then your eyes are the better judge.

# %%
tests = fresh.lr_find(seeds=8)
show(fresh.sched.plot(), "08_lr_find_eight_seeds")
for name, result in (("one head", test), ("eight heads", tests)):
    try:
        print(f"{name}: take {result.suggestion():.2g}")
    except jc.UserError as reason:
        print(f"{name}: {reason}")
print("the lesson takes 0.01")

# %% [markdown]
# ## 5. How many epochs?
#
# Go on for long enough and the model starts to learn its training images by heart: the train loss keeps falling
# while the valid loss stops, and then rises. That is overfitting. Stop where the valid loss is lowest; the table says
# when it was, and `fit(..., keep="best")` goes back there. To see it happen, a new head trains for much too long
# here, on at most 600 images made small (96 pixels), which makes the task harder.


# %%
def some_images(root: Path, out: Path, *, train: int, valid: int) -> Path:
    """Copies at most `train` and `valid` images of `root`, evenly over the classes; returns `root` itself if it has no more."""
    lists = {part: sorted(p for p in root.glob(f"{part}/*/*") if p.is_file()) for part in ("train", "valid")}
    if all(len(lists[part]) <= most for part, most in (("train", train), ("valid", valid))):
        return root
    shutil.rmtree(out, ignore_errors=True)
    for part, most in (("train", train), ("valid", valid)):
        for i in np.unique(np.linspace(0, len(lists[part]) - 1, most).astype(int)):
            to = out / lists[part][i].relative_to(root)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(lists[part][i], to)
    return out


few = some_images(root, OUT / "some_images", train=600, valid=1000)
small = jc.ImageClassifierData.from_paths(few, size=min(args.size, 96), batch_size=16)
too_long = jc.Learner.pretrained(args.backbone, small, precompute=True)
too_long.fit(0.01, 20)
show(too_long.sched.plot_loss(), "09_too_many_epochs")

# %% [markdown]
# ## 6. What a convolution does
#
# A convolution slides a small grid of weights, the *kernel*, over the image. In each place it multiplies the nine
# weights with the nine pixels under them and adds up. With the right weights the sum is large exactly where the
# image has, say, an edge between bright above and dark below. *ReLU* then replaces negative numbers by zero, and
# *max-pooling* keeps the largest of each 2 x 2 numbers: a quarter of the numbers, and still "there was an edge here".


# %%
def convolve(grey: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Weighted sums of every 3 x 3 window: [H, W] -> [H-2, W-2]."""
    return (np.lib.stride_tricks.sliding_window_view(grey, (3, 3)) * kernel).sum((-2, -1))


def relu(values: np.ndarray) -> np.ndarray:
    """Negative numbers become zero."""
    return np.maximum(values, 0)


def max_pool(values: np.ndarray) -> np.ndarray:
    """The largest of each 2 x 2 block: [H, W] -> [H/2, W/2]."""
    height, width = values.shape[0] // 2, values.shape[1] // 2
    return values[: 2 * height, : 2 * width].reshape(height, 2, width, 2).max((1, 3))


def convolution_figure(grey: np.ndarray, kernels: dict[str, np.ndarray]):
    """Shows a row per kernel: image, kernel, convolution, ReLU, max-pool."""
    figure, axes = plt.subplots(len(kernels), 5, figsize=(14, 3.1 * len(kernels)), layout="constrained")
    for row, (name, kernel) in zip(axes, kernels.items(), strict=True):
        sums = convolve(grey, kernel)
        limit = np.percentile(np.abs(sums), 99)
        row[0].imshow(grey, cmap="gray")
        row[1].imshow(kernel, cmap="RdBu_r", vmin=-1.8, vmax=1.8)
        for (i, j), weight in np.ndenumerate(kernel):
            row[1].text(j, i, f"{weight:+.0f}" if weight else "0", ha="center", va="center", fontsize=16)
        row[2].imshow(sums, cmap="RdBu_r", vmin=-limit, vmax=limit)
        row[3].imshow(relu(sums), cmap="gray", vmin=0, vmax=limit)
        row[4].imshow(max_pool(relu(sums)), cmap="gray", vmin=0, vmax=limit)
        shape = "{} x {}".format
        titles = (
            f"image, {shape(*grey.shape)}",
            name,
            "convolution\n(red: positive, blue: negative)",
            "after ReLU",
            f"after max-pool, {shape(*max_pool(sums).shape)}",
        )
        for ax, title in zip(row, titles, strict=True):
            ax.set_title(title, fontsize=11)
            ax.axis("off")
    return figure


TOP_EDGES = np.array([[1.0, 1, 1], [0, 0, 0], [-1, -1, -1]])
kernels = {"bright above, dark below": TOP_EDGES, "bright left, dark right": TOP_EDGES.T}
preprocess = dataclasses.replace(learn.model.preprocess, size=args.size)
pixels = evaluation_pixels(first, preprocess)
show(convolution_figure(pixels.mean(-1), kernels), "10_convolution")

# %% [markdown]
# ## 7. What the layers see
#
# Nobody chose the kernels of a trained network: training did. Those of the first layer look at pixels directly, so
# they can be drawn as little colour images. Many are edges in one direction, others are contrasts of colour.
# (EfficientNet-Lite0's are only 3 x 3; run this with `--backbone resnet34` to see the famous 7 x 7 ones.)


# %%
def first_filters(backbone: dict) -> np.ndarray:
    """The kernels [count, k, k, 3] of the first convolution, the only one with three input channels."""
    kernels = [leaf for leaf in jax.tree.leaves(backbone) if leaf.ndim == 4 and leaf.shape[2] == 3]
    return np.moveaxis(np.asarray(kernels[0]), -1, 0)


def filters_figure(filters: np.ndarray, *, columns: int = 16):
    """Shows each kernel as an image: grey is zero, and the largest weight of the kernel has full colour."""
    rows = -(-len(filters) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(0.75 * columns, 0.78 * rows + 0.5), layout="constrained")
    for ax in axes.flat:
        ax.axis("off")
    for ax, kernel in zip(axes.flat, filters, strict=False):
        ax.imshow(0.5 + 0.5 * kernel / np.abs(kernel).max())
    figure.suptitle(f"{len(filters)} kernels of {filters.shape[1]} x {filters.shape[2]} pixels in the first layer")
    return figure


show(filters_figure(first_filters(learn.params["backbone"])), "11_first_layer")

# %% [markdown]
# Deeper kernels look at what earlier layers say, so drawing them tells us nothing. Zeiler and Fergus
# (arXiv:1311.2901) had a better idea: find the images that excite a channel most, and look at the spot that did it.
# Each block of nine below belongs to one channel and shows nine different images, cut out around their strongest
# place. From row to row the channels get choosier: edges and colours first, then textures, then parts of things.


# %%
@partial(jax.jit, static_argnums=0)
def strongest(model, params, batch_stats, images):
    """The largest value of each channel and its place, two arrays [N, C] for each part of the backbone."""

    def of_part(outputs):
        flat = outputs.reshape(len(outputs), -1, outputs.shape[-1])
        return flat.max(1), flat.argmax(1)

    inputs = normalise(model.preprocess.mean, model.preprocess.std)(images)
    return {name: of_part(out) for name, out in model.activations(params, batch_stats, inputs).items()}


def layers_to_show(model, params, batch_stats, size: int) -> dict[str, int]:
    """Names and output sides of the parts to show: the first one, and the last one of each smaller output size."""
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    sides = {}

    def collect(*arguments):
        sides.update({name: out.shape[1] for name, out in model.activations(*arguments).items()})

    jax.eval_shape(collect, params, batch_stats, image)
    last = {side: name for name, side in sides.items()}
    first_name, first_side = next(iter(sides.items()))
    return {first_name: first_side} | {name: side for side, name in last.items() if side < first_side}


def nine_patches(images: np.ndarray, values: np.ndarray, places: np.ndarray, *, side: int) -> np.ndarray:
    """A mosaic of the nine images with the largest values, cut out around their places in outputs of `side` x `side`."""
    size, tile, gap = images.shape[1], 56, 3
    reach = min(size, max(12, 6 * size // side))
    mosaic = np.full((3 * tile + 2 * gap, 3 * tile + 2 * gap, 3), 255, np.uint8)
    for number, index in enumerate(np.argsort(-values, kind="stable")[:9]):
        centre = (np.array(divmod(places[index], side)) + 0.5) * size / side
        top, left = np.clip(np.round(centre - reach / 2).astype(int), 0, size - reach)
        patch = Image.fromarray(images[index, top : top + reach, left : left + reach]).resize((tile, tile))
        row, column = (tile + gap) * np.array(divmod(number, 3))
        mosaic[row : row + tile, column : column + tile] = np.asarray(patch)
    return mosaic


def choosy_channels(values: np.ndarray, count: int) -> np.ndarray:
    """The channels whose nine largest values are most standard deviations above their mean."""
    top = np.sort(values, axis=0)[-9:].mean(0)
    return np.argsort(-(top - values.mean(0)) / (values.std(0) + 1e-6), kind="stable")[:count]


def layers_figure(images: np.ndarray, peaks: dict, layers: dict[str, int], *, columns: int = 6):
    """Shows a row of channels per layer, with nine patches per channel."""
    figure, axes = plt.subplots(
        len(layers), columns, figsize=(2 * columns, 2.15 * len(layers)), layout="constrained", squeeze=False
    )
    for row, (name, side) in zip(axes, layers.items(), strict=True):
        values, places = peaks[name]
        for ax in row:
            ax.axis("off")
        for ax, channel in zip(row, choosy_channels(values, columns), strict=False):
            ax.imshow(nine_patches(images, values[:, channel], places[:, channel], side=side))
            ax.set_title(f"{name}, channel {channel}", fontsize=8)
    return figure


BATCH = 24
count = min(240, len(data.val_paths) // BATCH * BATCH) or len(data.val_paths)
spread = np.linspace(0, len(data.val_paths) - 1, count).astype(int)
sample = np.stack([evaluation_pixels(data.val_paths[i], preprocess) for i in spread])
parts = [
    jax.device_get(strongest(learn.model, learn.params, learn.batch_stats, sample[at : at + BATCH]))
    for at in range(0, count, BATCH)
]
peaks = jax.tree.map(lambda *pieces: np.concatenate(pieces), *parts)
layers = layers_to_show(learn.model, learn.params, learn.batch_stats, args.size)
show(layers_figure(sample, peaks, layers), "12_what_excites_the_layers")

# %% [markdown]
# And where did the network look when it gave its answer? Grad-CAM (arXiv:1610.02391) asks how much each channel of
# the last feature map speaks for an answer, and adds up the channels with these weights. The map is coarse, seven by
# seven for an image of 224 pixels, so read it as "around here". A network that is right for the wrong reason,
# because of the sofa and not the cat, gives itself away here.


# %%
@partial(jax.jit, static_argnums=0)
def heat_of(model, params, batch_stats, images, labels):
    """The Grad-CAM of uint8 images [N, H, W, 3] for these labels."""
    inputs = normalise(model.preprocess.mean, model.preprocess.std)(images)
    return grad_cam(model, params, batch_stats, inputs, labels)


def heat_figure(images: np.ndarray, heats: np.ndarray, titles: list[str]):
    """Shows each image above the same image with its heat map."""
    figure, axes = plt.subplots(2, len(images), figsize=(2.4 * len(images), 5.1), layout="constrained")
    for column, image, heat, title in zip(axes.T, images, heats, titles, strict=True):
        smooth = Image.fromarray(heat).resize(image.shape[1::-1], Image.Resampling.BICUBIC)
        column[0].imshow(image)
        column[0].set_title(title, fontsize=11)
        column[1].imshow(image.mean(-1), cmap="gray", vmin=0, vmax=255)
        drawn = column[1].imshow(np.asarray(smooth), cmap="inferno", alpha=0.55, vmin=0, vmax=1)
        for ax in column:
            ax.axis("off")
    bar = figure.colorbar(drawn, ax=axes[1], shrink=0.8, pad=0.01)
    bar.set_ticks([0, 1], labels=["nothing", "most"])
    bar.set_label("speaks for the answer")
    return figure


chosen = [*learn.most_by_correct(data.classes[0], True)[:2], *learn.most_by_correct(data.classes[1], True)[:2]]
chosen = np.array([*chosen, *learn.top_losses()[:2]])
images = np.stack([evaluation_pixels(data.val_paths[i], preprocess) for i in chosen])
heats = jax.device_get(heat_of(learn.model, learn.params, learn.batch_stats, images, guesses[chosen]))
titles = [
    f"says {data.classes[guesses[i]]} ({probs[i].max():.0%})\nlabel: {data.classes[data.val_y[i]]}" for i in chosen
]
show(heat_figure(images, heats, titles), "13_heat_map")

# %% [markdown]
# ## 8. How the weights are found
#
# Training goes downhill. The loss depends on the weights, and its gradient points uphill. So take a step in the other
# direction, as long as the gradient times the learning rate, and repeat. With a single weight you can watch this, and
# see why the learning rate matters.


# %%
def loss_of(weight):
    """A loss with its lowest point at 3."""
    return (weight - 3.0) ** 2


def descend(start: float, rate: float, steps: int) -> np.ndarray:
    """The weights at each step of gradient descent, from the start on."""
    path = [start]
    for _ in range(steps):
        path.append(float(path[-1] - rate * jax.grad(loss_of)(path[-1])))
    return np.array(path)


def descent_figure(rates: dict[str, float], *, start: float = -1.0, steps: int = 10):
    """Shows the loss and the steps of gradient descent for a few learning rates."""
    figure, axes = plt.subplots(1, len(rates), figsize=(4.4 * len(rates), 3.9), layout="constrained", sharey=True)
    weights = np.linspace(-7, 13, 200)
    for ax, (name, rate) in zip(axes, rates.items(), strict=True):
        path = descend(start, rate, steps)
        ax.plot(weights, loss_of(weights), color="0.7", linewidth=2)
        ax.plot(path, loss_of(path), "o-", color="#1b6ca8", markersize=5, linewidth=1)
        ax.plot(path[0], loss_of(path[0]), "o", color="black", markersize=9)
        ax.annotate("start", (path[0], loss_of(path[0])), xytext=(-12, 8), textcoords="offset points", ha="right")
        last = loss_of(path[-1])
        result = f"loss {loss_of(start):.0f}, after {steps} steps {last:.{0 if last > 1 else 4}f}"
        ax.set(title=f"{name}: {rate:g}\n{result}", xlabel="weight", xlim=(-7, 13), ylim=(-4, 80))
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("loss")
    return figure


rates = {"too small": 0.01, "about right": 0.2, "too large": 1.06}
show(descent_figure(rates), "14_gradient_descent")

# %% [markdown]
# What do the weights belong to? A linear layer multiplies and adds, and two of them in a row are still only one
# straight line. Put something bent between them, a sigmoid or a ReLU, and with enough units they can follow any
# curve. That is all a neural network is: linear layers with something bent in between, and gradient descent to set
# the weights.

# %%
BENDS = {
    "linear layers only": lambda x: x,
    "with a sigmoid between": jax.nn.sigmoid,
    "with a ReLU between": jax.nn.relu,
}
WIDTHS = (1, 24, 24, 1)


def small_network(weights, x, bend):
    """Applies the layers to x [N, 1], with the function `bend` between them."""
    for matrix, bias in weights[:-1]:
        x = bend(x @ matrix + bias)
    matrix, bias = weights[-1]
    return x @ matrix + bias


def fit_curve(x, y, bend, *, steps: int):
    """Trains random weights with `steps` steps of Adam on the squared error."""
    draw = jax.nn.initializers.he_normal()
    sizes = list(itertools.pairwise(WIDTHS))
    keys = jax.random.split(jax.random.key(1), len(sizes))
    weights = [(draw(key, size), jnp.zeros(size[1])) for key, size in zip(keys, sizes, strict=True)]
    tx = optax.adam(0.02)

    def step(state, _):
        weights, opt_state = state
        grads = jax.grad(lambda w: ((small_network(w, x, bend) - y) ** 2).mean())(weights)
        updates, opt_state = tx.update(grads, opt_state)
        return (optax.apply_updates(weights, updates), opt_state), None

    (weights, _), _ = jax.lax.scan(step, (weights, tx.init(weights)), length=steps)
    return weights


@partial(jax.jit, static_argnums=3)
def fitted(x, y, grid, bend):
    """The outputs of a trained network on `grid`, and its mean squared error on the points."""
    weights = fit_curve(x, y, bend, steps=2000)
    return small_network(weights, grid, bend), ((small_network(weights, x, bend) - y) ** 2).mean()


def curves_figure(x, y):
    """Shows the same points fitted by networks that differ only in the function between their layers."""
    figure, axes = plt.subplots(1, len(BENDS), figsize=(4.4 * len(BENDS), 3.9), layout="constrained", sharey=True)
    grid = np.linspace(-1.05, 1.05, 300, dtype=np.float32)[:, None]
    for ax, (name, bend) in zip(axes, BENDS.items(), strict=True):
        curve, error = fitted(x, y, grid, bend)
        ax.plot(x, y, "o", color="0.6", markersize=4, label="points")
        ax.plot(grid, curve, color="#c1440e", linewidth=2.5, label="network")
        ax.set(title=f"{name}\nmean squared error {error:.3f}", xlabel="x")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    return figure


noise = np.random.default_rng(0)
x = np.sort(noise.uniform(-1, 1, (80, 1)), axis=0)
y = np.sin(6 * x) * (0.5 + x**2) + noise.normal(0, 0.06, x.shape)
show(curves_figure(x.astype(np.float32), y.astype(np.float32)), "15_small_networks")

# %% [markdown]
# ## 9. The longer flow
#
# Three lines gave a good classifier. The lesson then tries for a better one, in four steps. Training the whole
# network needs a hundred times the work of training a head, so unless you ask for `--long` this part takes the small
# images again, and two cycles instead of three: enough to see each step work, too little for good numbers. It
# starts with a new head, because smaller images look different to the backbone.

# %%
if not args.long:
    data = small
learn = jc.Learner.pretrained(args.backbone, data, precompute=True)
learn.fit(0.01, 2)
RESULTS.append((f"new head at {data.settings.size} px, precomputed", *learn.errors()))

# %% [markdown]
# **Augmentation.** A cat seen in a mirror, a little turned or a little darker is still a cat. Showing each image
# differently every time makes it harder to learn the images by heart. `side_on` is for photos taken from the side; for satellites
# there is `top_down`. Precomputed features exist only for the original images, so now the backbone has to
# look at every image again.

# %%
learn.data.augment = "side_on"
show(learn.data.show_augmented(), "16_augmentation")
learn.precompute = False
learn.fit(0.01, 3 if args.long else 2, cycle_len=1)
RESULTS.append(("augmentation, head only", *learn.errors()))

# %% [markdown]
# **Cycles.** With `cycle_len=1` the learning rate falls along a cosine during each epoch and then jumps back (SGDR,
# arXiv:1608.03983). Small steps at the end settle into a low place; the jump shakes the weights out of narrow ones.

# %%
show(learn.sched.plot_lr(), "17_cycles")

# %% [markdown]
# **Unfreezing.** Until now the backbone stayed as it came. Now all of it learns, but not at one rate: the early
# layers know about edges, which are the same everywhere, and should hardly change; the late ones may change more, the
# head most. `cycle_mult=2` makes each cycle twice as long as the one before. The lesson's rates are for batches of
# 64; the gradient of a smaller batch is less reliable, so the rates are made smaller in proportion.

# %%
learn.unfreeze()
rates = np.array([1e-4, 1e-3, 1e-2]) * data.batch_size / 64
learn.fit(rates, 3 if args.long else 2, cycle_len=1, cycle_mult=2)
RESULTS.append(("all layers, three rates", *learn.errors()))
show(learn.sched.plot_lr(), "18_three_rates")

# %% [markdown]
# **Test-time augmentation.** Ask about each image several times, as it is and augmented, and take the average.

# %%
averaged = learn.TTA(n=4)
RESULTS.append(("the same, averaged over 5 views (TTA)", *learn.errors(averaged)))

# %% [markdown]
# ## 10. What changed?
#
# One line per step, as errors of n. Before you believe that a step helped, look at the intervals: when they overlap
# by much, chance alone may have done it, and more validation images are the way to find out. Compare the first line
# with the others only after `--long`; without it, the others saw fewer and smaller images.


# %%
def results_figure(results: list[tuple[str, int, int]]):
    """Shows the accuracy of each step with its interval."""
    figure, ax = plt.subplots(figsize=(9, 0.6 * len(results) + 1.4), layout="constrained")
    for row, (_, errors, n) in enumerate(results):
        low, high = (100 * share for share in wilson_interval(n - errors, n))
        ax.plot([low, high], [row, row], color="#1b6ca8", linewidth=6, alpha=0.35, solid_capstyle="butt")
        ax.plot(100 * (n - errors) / n, row, "o", color="#1b6ca8", markersize=9)
        ax.annotate(
            f"{errors:,} of {n:,}", (low, row), xytext=(-8, 0), textcoords="offset points", ha="right", va="center"
        )
    ax.set_yticks(range(len(results)), [name for name, _, _ in results])
    ax.invert_yaxis()
    ax.margins(x=0.25, y=0.15)
    ax.set_xlim(right=100.3)
    ax.set_title("Errors, and the share of right answers with its 95 % interval", loc="left", fontsize=11)
    ax.set_xlabel("right answers, %")
    ax.spines[["top", "right"]].set_visible(False)
    return figure


for name, errors, n in RESULTS:
    print(f"{name:<44} {jc.sentence(errors, n)}")
show(results_figure(RESULTS), "19_what_changed")

# %% [markdown]
# ## 11. Now yours
#
# Point `--root` at your own folder. Look at the images first, train three lines, look at the mistakes, choose a
# rate, and go further only when the numbers say that it pays.
