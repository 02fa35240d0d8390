"""Batches of images through tf.data, each by Pillow's evaluation transform: every one in order, or in a given order.

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
from pathlib import Path
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

    Yields {"image": uint8 [B, S, S, 3], "label": int32 [B], "mask": bool [B], "index": int32 [B]}; padding has zero
    pixels, label 0, mask False and index -1. Raises UserError naming a file that can no longer be read.
    """
    rows = np.arange(len(split)) if indices is None else np.asarray(indices)
    steps = -(-len(rows) // batch_size)
    order = np.full(steps * batch_size, -1, np.int32)
    order[: len(rows)] = rows
    return _closed_at_exit(_pillow_batches(split, order.reshape(steps, batch_size), preprocess, workers))


def training_batches(
    split: Split, *, preprocess: Preprocess, order: np.ndarray, workers: int | None = None
) -> Generator[Batch, None, None]:
    """One batch per row of `order`, an int array [steps, B] of rows of `split`; the mask is True throughout.

    The pixels are those of evaluation under `preprocess`; what is random about them is done on the device (augment.py).
    Batches and errors are those of `evaluation_batches`.
    """
    return _closed_at_exit(_pillow_batches(split, np.asarray(order, np.int32), preprocess, workers))


def _pillow_batches(
    split: Split, order: np.ndarray, preprocess: Preprocess, workers: int | None
) -> Generator[Batch, None, None]:
    tf = _tensorflow()
    workers = workers or os.cpu_count() or 1
    size, broken = preprocess.size, list[UserError]()

    # A thread pool under a whole batch loses less to the interpreter than one numpy_function per image.
    with ThreadPoolExecutor(workers) as pool:

        def pixels(rows: np.ndarray) -> np.ndarray:
            images = np.zeros((len(rows), size, size, 3), np.uint8)

            def put(place: int) -> None:
                if rows[place] >= 0:
                    images[place] = _read(split, rows[place], preprocess, broken)

            try:
                tasks = [pool.submit(put, place) for place in range(len(rows))]
            except RuntimeError:  # the pool is shut down, and TensorFlow, not yet stopped, asks for one more batch
                for place in range(len(rows)):
                    put(place)
            else:
                for task in tasks:
                    task.result()
            return images

        def batch(rows: "tf.Tensor") -> "tf.Tensor":
            return tf.ensure_shape(tf.numpy_function(pixels, [rows], tf.uint8), [order.shape[1], size, size, 3])

        dataset = tf.data.Dataset.from_tensor_slices(order).map(batch, num_parallel_calls=2).prefetch(2)
        yield from _run(split, order, dataset, workers, broken)


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
            raise (broken[0] if broken else error) from None
        mask = rows >= 0
        label = np.where(mask, split.labels[rows], 0).astype(np.int32)
        yield {"image": image, "label": label, "mask": mask, "index": rows.copy()}


def _read(split: Split, row: Any, preprocess: Preprocess, broken: list[UserError]) -> np.ndarray:
    """An image's pixels; a failure is kept in `broken`, since TensorFlow passes on only its text.

    Another image in the place of the one that was indexed is a failure too: its features would be kept under the
    content of the old one, and its side of a split was never drawn.
    """
    path = os.path.join(split.root, split.paths[int(row)])
    way_out = "put the file back, or start again to index the folder as it is"
    try:
        content = Path(path).read_bytes()
        if hashlib.sha256(content).hexdigest() != split.hashes[int(row)]:
            changed = UserError(f"{path}: has changed since the folder was indexed; {way_out} (data.rehash: true)")
            broken.append(changed)
            raise changed
        return evaluation_pixels(content, preprocess)
    except UserError:
        raise
    except Exception as error:
        reason = bad_reason(error)
        broken.append(
            UserError(f"{path}: could be read when the folder was indexed and can't be now ({reason}); {way_out}")
        )
        raise


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
    silence_tensorflow()
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
