"""Batches of pictures through tf.data: Pillow's evaluation transform in order, or training crops in a given order.

TensorFlow is imported when the first batch is asked for, and never sees a GPU.
"""

import atexit
import contextlib
import hashlib
import os
import weakref
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from jaxcats.data.index import Split
from jaxcats.data.preprocess import Preprocess, bad_reason, crop_pixels, evaluation_pixels, open_upright
from jaxcats.errors import UserError

if TYPE_CHECKING:
    import tensorflow as tf

Batch = dict[str, np.ndarray]

# By EXIF orientation 1 to 8: swap rows and columns first, then flip rows, then flip columns.
_SWAP = (False, False, False, False, True, True, True, True)
_FLIP_ROWS = (False, False, True, True, False, False, True, True)
_FLIP_COLUMNS = (False, True, True, False, False, True, True, False)


def evaluation_batches(
    split: Split,
    *,
    preprocess: Preprocess,
    batch_size: int,
    indices: Sequence[int] | np.ndarray | None = None,
    workers: int | None = None,
) -> Generator[Batch, None, None]:
    """Every picture once, in order, through `evaluation_pixels`; the last batch is padded and masked.

    Args:
        indices: rows of `split`, in the order wanted; None is all of them.
        workers: decoding threads; None is one per core.

    Yields {"image": uint8 [B, S, S, 3], "label": int32 [B], "mask": bool [B], "index": int32 [B]}; padding has zero
    pixels, label 0, mask False and index -1. Raises UserError naming a file that can no longer be read.
    """
    rows = np.arange(len(split)) if indices is None else np.asarray(indices)
    steps = -(-len(rows) // batch_size)
    order = np.full(steps * batch_size, -1, np.int32)
    order[: len(rows)] = rows
    return _closed_at_exit(_pillow_batches(split, order.reshape(steps, batch_size), preprocess, workers))


def training_batches(
    split: Split,
    *,
    preprocess: Preprocess,
    order: np.ndarray,
    epoch: int,
    seed: int,
    crop: Literal["center", "random"],
    workers: int | None = None,
) -> Generator[Batch, None, None]:
    """One batch per row of `order`, an int array [steps, B] of rows of `split`; the mask is True throughout.

    "center" gives the pixels of evaluation. "random" decodes in TensorFlow, brings the shorter side to
    `preprocess.size` and cuts a square at a place that depends on (seed, epoch, row) alone, so that the rows from the
    middle of an epoch continue it exactly. Batches and errors are those of `evaluation_batches`.
    """
    order = np.asarray(order, np.int32)
    if crop == "center":
        return _closed_at_exit(_pillow_batches(split, order, preprocess, workers))
    return _closed_at_exit(_random_crop_batches(split, order, preprocess, _mixed(seed, epoch), workers))


def _pillow_batches(
    split: Split, order: np.ndarray, preprocess: Preprocess, workers: int | None
) -> Generator[Batch, None, None]:
    tf = _tensorflow()
    workers = workers or os.cpu_count() or 1
    size, broken = preprocess.size, list[UserError]()

    # A thread pool under a whole batch loses less to the interpreter than one numpy_function per picture.
    with ThreadPoolExecutor(workers) as pool:

        def pixels(rows: np.ndarray) -> np.ndarray:
            images = np.zeros((len(rows), size, size, 3), np.uint8)

            def put(place: int) -> None:
                if rows[place] >= 0:
                    images[place] = _read(split, rows[place], broken, lambda path: evaluation_pixels(path, preprocess))

            list(pool.map(put, range(len(rows))))
            return images

        def batch(rows: "tf.Tensor") -> "tf.Tensor":
            return tf.ensure_shape(tf.numpy_function(pixels, [rows], tf.uint8), [order.shape[1], size, size, 3])

        dataset = tf.data.Dataset.from_tensor_slices(order).map(batch, num_parallel_calls=2).prefetch(2)
        yield from _run(split, order, dataset, workers, broken)


def _random_crop_batches(
    split: Split, order: np.ndarray, preprocess: Preprocess, seed: int, workers: int | None
) -> Generator[Batch, None, None]:
    tf = _tensorflow()
    workers = workers or os.cpu_count() or 1
    size, broken = preprocess.size, list[UserError]()
    plain, orientation = tf.constant(split.plain), tf.constant(split.orientation.astype(np.int32))

    def content(row: np.ndarray) -> bytes:
        def read(path: str) -> bytes:
            with open(path, "rb") as file:
                return file.read()

        return _read(split, row, broken, read)

    def pillow_crop(row: np.ndarray, at: np.ndarray) -> np.ndarray:
        def crop(path: str) -> np.ndarray:
            return crop_pixels(open_upright(path), preprocess, resize_to=size, at=(float(at[0]), float(at[1])))

        return _read(split, row, broken, crop)

    def picture(row: "tf.Tensor") -> "tf.Tensor":
        at = tf.random.stateless_uniform([2], seed=tf.stack([tf.constant(seed, tf.int64), tf.cast(row, tf.int64)]))
        image = tf.cond(
            plain[row],
            lambda: _tf_crop(tf, tf.numpy_function(content, [row], tf.string), orientation[row], at, preprocess),
            lambda: tf.numpy_function(pillow_crop, [row, at], tf.uint8),
        )
        return tf.ensure_shape(image, [size, size, 3])

    dataset = tf.data.Dataset.from_tensor_slices(order.ravel())
    dataset = dataset.map(picture, num_parallel_calls=workers).batch(order.shape[1]).prefetch(2)
    yield from _run(split, order, dataset, workers, broken)


def _tf_crop(tf: Any, content: "tf.Tensor", orientation: "tf.Tensor", at: "tf.Tensor", preprocess: Preprocess) -> Any:
    """Decode, turn upright, and resize just the square that is wanted; uint8 [size, size, 3]."""
    # INTEGER_ACCURATE is the DCT that Pillow uses; TensorFlow's default differs.
    image = tf.cond(
        tf.io.is_jpeg(content),
        lambda: tf.io.decode_jpeg(content, channels=3, dct_method="INTEGER_ACCURATE"),
        lambda: tf.io.decode_png(content, channels=3),
    )
    image = tf.cond(orientation == 1, lambda: image, lambda: _tf_upright(tf, image, orientation - 1))
    size = preprocess.size
    height, width = tf.unstack(tf.shape(image)[:2])
    shorter = tf.minimum(height, width)
    sides = tf.stack([size * height // shorter, size * width // shorter])
    corner = tf.floor(at * tf.cast(sides - size + 1, tf.float32))
    # This op lies under tf.image.resize(antialias=True); called directly it makes the cropped square only.
    resized = tf.raw_ops.ScaleAndTranslate(
        images=image[tf.newaxis],
        size=[size, size],
        scale=tf.cast(sides, tf.float32) / tf.cast(tf.stack([height, width]), tf.float32),
        translation=-corner,
        kernel_type={"bilinear": "triangle", "bicubic": "keyscubic"}[preprocess.interpolation],
        antialias=True,
    )[0]
    return tf.cast(tf.clip_by_value(tf.round(resized), 0.0, 255.0), tf.uint8)


def _tf_upright(tf: Any, image: "tf.Tensor", place: "tf.Tensor") -> Any:
    image = tf.cond(tf.constant(_SWAP)[place], lambda: tf.transpose(image, [1, 0, 2]), lambda: image)
    image = tf.cond(tf.constant(_FLIP_ROWS)[place], lambda: tf.reverse(image, [0]), lambda: image)
    return tf.cond(tf.constant(_FLIP_COLUMNS)[place], lambda: tf.reverse(image, [1]), lambda: image)


def _run(
    split: Split, order: np.ndarray, dataset: "tf.data.Dataset", workers: int, broken: list[UserError]
) -> Generator[Batch, None, None]:
    """Images of the dataset joined with the rest of each batch; TensorFlow's errors become the user's."""
    tf = _tensorflow()
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    options.threading.private_threadpool_size = workers + 1
    options.threading.max_intra_op_parallelism = 1  # the cores beside the decoding are JAX's
    images = iter(dataset.with_options(options).as_numpy_iterator())
    for rows in order:
        try:
            image = next(images)
        except tf.errors.OpError as error:
            raise (broken[0] if broken else _undecodable(tf, split, rows, error)) from None
        mask = rows >= 0
        label = np.where(mask, split.labels[rows], 0).astype(np.int32)
        yield {"image": image, "label": label, "mask": mask, "index": rows.copy()}


def _read(split: Split, row: Any, broken: list[UserError], use: Callable[[str], Any]) -> Any:
    """What `use` makes of a picture's path; a failure is kept in `broken`, since TensorFlow passes on only its text."""
    path = os.path.join(split.root, split.paths[int(row)])
    try:
        return use(path)
    except Exception as error:
        reason = bad_reason(error)
        broken.append(
            UserError(
                f"{path}: could be read when the folder was indexed and can't be now ({reason}); "
                "put the file back, or start again to index the folder as it is"
            )
        )
        raise


def _undecodable(tf: Any, split: Split, rows: np.ndarray, error: Exception) -> Exception:
    """The error that names the file of this batch that TensorFlow can't decode."""
    for row in rows:
        path = os.path.join(split.root, split.paths[row])
        try:
            tf.io.decode_image(tf.io.read_file(path), channels=3)
        except tf.errors.OpError as cause:
            reason = str(cause.message).splitlines()[0]
            return UserError(
                f"{path}: TensorFlow can't decode it ({reason}); save it anew as JPEG or PNG, or remove it"
            )
    return error


def _mixed(seed: int, epoch: int) -> int:
    """63 bits that depend on both."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{epoch}".encode()).digest()[:8], "big") >> 1


_open_batches: "weakref.WeakSet[Any]" = weakref.WeakSet()


def _closed_at_exit(batches: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
    _open_batches.add(batches)
    return batches


def _close_all() -> None:
    # TensorFlow's threads call Python. Left alone they wait for the interpreter while it, shutting down, waits for them.
    for batches in list(_open_batches):
        with contextlib.suppress(ValueError):  # it is running, in another thread
            batches.close()


@cache
def _tensorflow() -> Any:
    """TensorFlow, imported quietly and hidden from GPUs before any op runs."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # unused here, and announced on stderr
    import tensorflow as tf

    try:
        tf.config.set_visible_devices([], "GPU")
        tf.config.threading.set_inter_op_parallelism_threads(1)
        tf.config.threading.set_intra_op_parallelism_threads(1)
    except RuntimeError:  # the program has used TensorFlow before us: its settings stand
        pass
    atexit.register(_close_all)  # after TensorFlow's own, so that it runs before them
    return tf
