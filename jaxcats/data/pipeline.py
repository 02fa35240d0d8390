"""Batches of images through tf.data, with the pixels of the evaluation transform, in order or in a given order.

TensorFlow is imported when the first batch is asked for, and never sees a GPU.
"""

import atexit
import contextlib
import hashlib
import os
import weakref
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcats.common.cli import silence_tensorflow
from jaxcats.common.errors import UserError
from jaxcats.data.images import Preprocess, bad_reason, evaluation_pixels
from jaxcats.data.index import Split

if TYPE_CHECKING:
    import tensorflow as tf


Batch = dict[str, np.ndarray]


def evaluation_batches(
    split: Split,
    *,
    preprocess: Preprocess,
    batch_size: int,
    indices: Sequence[int] | np.ndarray | None = None,
    workers: int | None = None,
) -> Generator[Batch, None, None]:
    """Every image once, in order, through `evaluation_pixels`; the last batch is padded and masked.

    Args:
        indices: rows of `split`, in the order wanted; None is all of them.
        workers: decoding threads; None is one per core.

    Yields:
        {"image": uint8 [B, S, S, 3], "label": int32 [B], "mask": bool [B], "index": int32 [B]}; padding has zero pixels,
        label 0, mask False and index -1.

    Raises:
        UserError: a file can no longer be read, or has changed; names it.
    """
    rows = np.arange(len(split)) if indices is None else np.asarray(indices, np.int32)
    order = np.pad(rows, (0, -len(rows) % batch_size), constant_values=-1).reshape(-1, batch_size)
    return training_batches(split, preprocess=preprocess, order=order, workers=workers)


def training_batches(
    split: Split, *, preprocess: Preprocess, order: np.ndarray, workers: int | None = None
) -> Generator[Batch, None, None]:
    """One batch per row of `order`, an int array [steps, B] of rows of `split`; -1 is padding.

    Pixels, batches and errors are those of `evaluation_batches`; augmentation is done on the device (augment.py).
    """
    batches = _batches(split, preprocess, np.asarray(order, np.int32), workers or os.cpu_count() or 1)
    _open_batches.add(batches)
    return batches


def _batches(split: Split, preprocess: Preprocess, order: np.ndarray, workers: int) -> Generator[Batch, None, None]:
    tf = _tensorflow()
    size, errors = preprocess.size, list[UserError]()  # TensorFlow passes on only the text of an error

    # A thread pool under a whole batch loses less to the interpreter than one numpy_function per image.
    with ThreadPoolExecutor(workers) as pool:

        def read_batch(rows: np.ndarray) -> np.ndarray:
            images = np.zeros((len(rows), size, size, 3), np.uint8)
            places = np.flatnonzero(rows >= 0).tolist()

            def read(place: int) -> None:
                try:
                    images[place] = _read(split, int(rows[place]), preprocess)
                except UserError as error:
                    errors.append(error)
                    raise

            try:
                list(pool.map(read, places))
            except RuntimeError:  # the pool is shut down, and TensorFlow, not yet stopped, asks for one more batch
                list(map(read, places))
            return images

        def to_images(rows: "tf.Tensor") -> "tf.Tensor":
            return tf.ensure_shape(tf.numpy_function(read_batch, [rows], tf.uint8), [order.shape[1], size, size, 3])

        dataset = tf.data.Dataset.from_tensor_slices(order).map(to_images, num_parallel_calls=2).prefetch(2)
        options = tf.data.Options()
        options.deterministic = True
        options.autotune.enabled = False
        options.threading.private_threadpool_size = workers + 1
        options.threading.max_intra_op_parallelism = 1  # the other cores are JAX's
        images = iter(dataset.with_options(options).as_numpy_iterator())
        for rows in order:
            try:
                image = next(images)
            except tf.errors.OpError as error:
                raise (errors[0] if errors else error) from None
            mask = rows >= 0
            label = np.where(mask, split.labels[rows], 0).astype(np.int32)
            yield {"image": image, "label": label, "mask": mask, "index": rows.copy()}


def _read(split: Split, row: int, preprocess: Preprocess) -> np.ndarray:
    """An image's pixels.

    A file that has changed since it was indexed is an error too: its features would be cached under the hash of the old
    content, and its split was drawn for the old content.
    """
    path = split.root / split.paths[row]
    way_out = "restore the file, or run the command again to index the folder's present content"
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() == split.hashes[row]:
            return evaluation_pixels(content, preprocess)
    except Exception as error:
        problem = f"{path}: could be read when the folder was indexed and can't be now ({bad_reason(error)})"
        raise UserError(f"{problem}; {way_out}") from error
    raise UserError(f"{path}: has changed since the folder was indexed; {way_out} (data.rehash: true)")


_open_batches: "weakref.WeakSet[Any]" = weakref.WeakSet()


def _close_all() -> None:
    # TensorFlow's threads call Python. Left alone they wait for the interpreter while it, shutting down, waits for them.
    for batches in list(_open_batches):
        with contextlib.suppress(ValueError):  # the generator is running in another thread
            batches.close()


@cache
def _tensorflow() -> Any:
    """TensorFlow, imported quietly and hidden from GPUs before any op runs."""
    silence_tensorflow()
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # unused here, and announced on stderr
    import tensorflow as tf

    try:
        tf.config.set_visible_devices([], "GPU")
        tf.config.threading.set_inter_op_parallelism_threads(1)
        tf.config.threading.set_intra_op_parallelism_threads(1)
    except RuntimeError:  # the program has used TensorFlow before, so its settings remain
        pass
    atexit.register(_close_all)  # registered after TensorFlow's exit functions, so that it runs before them
    return tf
