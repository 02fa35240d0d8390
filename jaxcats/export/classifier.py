"""Predicts with an artefact: `jaxcats.load`. Needs only jax, flatbuffers, numpy, safetensors and Pillow."""

import functools
import itertools
import os
import stat
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxcats.common import compile_cache
from jaxcats.common.errors import RunError, UserError, first_line
from jaxcats.data.augment import PRESETS, Augmentation, make_augment, source_preprocess
from jaxcats.data.images import ImageError, bad_reason, evaluation_pixels
from jaxcats.export import artifact

ImageLike = str | os.PathLike | bytes | bytearray | memoryview | Image.Image | np.ndarray
Decoded = tuple[str | None, list[np.ndarray], str | None]  # path, pixels for the network and for TTA, error


def load(folder: str | os.PathLike) -> "Classifier":
    """Loads an exported classifier after verifying it.

    Args:
        folder: what `train` or `export` wrote, or a run folder with it in model/.

    Raises:
        UserError: the folder is no artefact, or a damaged one; the message names the file and the reason.

    >>> classifier = jaxcats.load("runs/x/model")
    >>> classifier.predict(["a.jpg", "b.jpg"]).labels
    ['cats', 'dogs']
    """
    compile_cache.enable_compilation_cache()
    return Classifier(artifact.read(folder))


@dataclass(frozen=True, eq=False)
class Prediction:
    """The prediction for one image.

    Attributes:
        path: as given; None for an image that was not a file.
        label: the most probable class; None if the image can't be used.
        probability: of that class, calibrated.
        abstain: whether the probability is below the threshold that was chosen at export.
        error: why the image can't be used; None if it can.
        probabilities: float32 [C]; NaN if the image can't be used.
    """

    path: str | None
    label: str | None
    probability: float
    abstain: bool
    error: str | None
    probabilities: np.ndarray

    def __repr__(self) -> str:
        result = self.error or f"{self.label} {self.probability:.4f}{' (unsure)' if self.abstain else ''}"
        return f"{self.path}: {result}" if self.path else result


class Predictions(Sequence[Prediction]):
    """One Prediction per image, in order, and the same as columns.

    Attributes:
        classes: names in the order of the probabilities.
        probabilities: float32 [N, C]; a row of NaN for an image that can't be used.
        confidence: float32 [N], the highest probability of each row.
        labels, errors, paths: lists of length N, with None where there is none.
        abstain: bool [N].
    """

    def __init__(self, rows: Sequence[Prediction], classes: tuple[str, ...]):
        self._rows, self.classes = list(rows), classes
        self.probabilities = np.array([row.probabilities for row in rows], np.float32).reshape(-1, len(classes))
        self.confidence = np.array([row.probability for row in rows], np.float32)
        self.labels = [row.label for row in rows]
        self.abstain = np.array([row.abstain for row in rows], bool)
        self.errors = [row.error for row in rows]
        self.paths = [row.path for row in rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return Predictions(self._rows[index], self.classes) if isinstance(index, slice) else self._rows[index]

    def __repr__(self) -> str:
        lines = [repr(row) for row in self._rows[:20]]
        if len(self) > 20:
            lines.append(f"... and {len(self) - 20:,} more")
        return "\n".join(lines) or "no images"


class Classifier:
    """An exported classifier; `jaxcats.load(folder)` makes one.

    Attributes:
        classes: names in the order of the probabilities.
        threshold: the probability below which a prediction abstains; None if it never does.
        facts: the content of model.json.
    """

    def __init__(self, verified: artifact.Artifact):
        self.facts, self.classes = verified.facts, verified.classes
        self.threshold: float | None = self.facts["abstain"].get("threshold")
        self._folder, self._preprocess = verified.folder, verified.preprocess
        self._augmentation = PRESETS[self.facts["tta"]["augment"]] or Augmentation()
        self._tensors = jax.device_put(verified.tensors)
        self._call = compile_cache.jit(verified.exported.call)

    def __repr__(self) -> str:
        accuracy = self.facts.get("accuracy")
        names = ", ".join(self.classes[:6]) + (", ..." if len(self.classes) > 6 else "")
        measured = f"; {accuracy['errors']:,} errors of {accuracy['n']:,} when exported" if accuracy else ""
        return f"Classifier: {self.facts['backbone']}, {len(self.classes)} classes ({names}){measured}"

    def predict(self, images: Any, *, batch_size: int = 32, tta: int = 0) -> Predictions:
        """Predicts the classes of images. An image that can't be used is a row with the reason.

        The probabilities of an image are the same to 1e-5 whichever images come with it, in any order.

        Args:
            images: a path, bytes (the content of a file), a Pillow image, a uint8 array [H, W, 3], [H, W] or
                [N, H, W, 3], or a list of these.
            batch_size: images per call of the network.
            tta: the number of augmented versions of each image to average with the plain one. The random draws depend
                on the pixels of the image alone, so they are not those of `evaluate --tta`. Besides, the augmented
                pixels are rounded to whole numbers here, and probabilities are calibrated before they are averaged.
                The rounding alone moves a probability by 0.0002 on average and by 0.003 at most, on photos.

        Raises:
            UserError: something in the list is not an image.
        """
        return Predictions(list(self.stream(_as_list(images), batch_size=batch_size, tta=tta)), self.classes)

    def stream(self, images: Iterable[ImageLike], *, batch_size: int = 32, tta: int = 0) -> Iterator[Prediction]:
        """Does the same as `predict`, row by row, and holds a few batches of images at a time.

        It reads the probabilities of a batch when the next one has started, so that a GPU does not wait for decoding.
        """
        for name, value, least in (("batch_size", batch_size, 1), ("tta", tta, 0)):
            if type(value) is not int or value < least:
                raise UserError(f"{name}: {value!r} can't be used; expected {least} or more.")
        preprocesses = [self._preprocess]
        if tta:
            preprocesses.append(source_preprocess(self._preprocess, self._augmentation))
        decode = functools.partial(_decode, preprocesses=preprocesses)
        pool = ThreadPoolExecutor(os.cpu_count())
        try:
            decoded = _map_ahead(pool, decode, iter(images), 2 * batch_size + 2)
            started: deque[tuple[list[Decoded], Any]] = deque([([], ())])
            while batch := list(itertools.islice(decoded, batch_size)):
                started.append((batch, self._run([pixels for _, pixels, _ in batch if pixels], batch_size, tta)))
                yield from self._rows(*started.popleft())
            yield from self._rows(*started.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _run(self, pixels: list[list[np.ndarray]], batch_size: int, tta: int) -> Any:
        """Runs the network on a batch; returns probabilities [B, C], with rows of padding after those of the images."""
        if not pixels:
            return np.zeros((0, len(self.classes)), np.float32)
        # At most three sizes, so that at most three programs are compiled. In bfloat16 the program for one image rounds
        # differently from those for several, by 0.003 in a probability.
        sizes = (1, 8, batch_size) if self.facts["dtype"] == "float32" else (8, max(8, batch_size))
        size = min(size for size in sizes if size >= len(pixels))
        pixels = pixels + [pixels[-1]] * (size - len(pixels))
        images = np.stack([versions[0] for versions in pixels])
        try:
            total = self._call(self._tensors, images)
        except ValueError as error:
            problem = f"can't be run on this machine's {jax.default_backend()}: {first_line(error)}"
            raise UserError(f"{self._folder}: {problem}.") from None
        if tta:
            sources = np.stack([versions[1] for versions in pixels])
            content = np.array([zlib.crc32(versions[0].tobytes()) >> 1 for versions in pixels], np.int32)
            for version in range(tta):
                total = total + self._call(self._tensors, self._augment(sources, version, content))
        return total / (tta + 1)

    @functools.cached_property
    def _augment(self) -> Callable[[np.ndarray, int, np.ndarray], jax.Array]:
        """Draws one version of each image: (uint8 [B, R, R, 3], number of the version, hashes [B]) -> uint8 [B, S, S, 3]."""
        augment = make_augment(self._augmentation, key=jax.random.key(zlib.crc32(b"tta")), size=self._preprocess.size)
        return jax.jit(lambda *args: jnp.round(augment(*args)).astype(jnp.uint8))

    def _rows(self, batch: list[Decoded], probabilities: Any) -> Iterator[Prediction]:
        rows = iter(np.asarray(probabilities))
        for path, pixels, error in batch:
            if not pixels:
                yield Prediction(path, None, np.nan, False, error, np.full(len(self.classes), np.nan, np.float32))
                continue
            row = next(rows)
            best = int(row.argmax())
            if not np.isfinite(row[best]):
                raise RunError(f"{self._folder}: the network's probabilities are not numbers; train it again.")
            abstain = self.threshold is not None and bool(row[best] < self.threshold)
            yield Prediction(path, self.classes[best], float(row[best]), abstain, None, row)


def _as_list(images: Any) -> Iterable[ImageLike]:
    """The images in what `predict` takes: a single one becomes a list of one."""
    if isinstance(images, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)):
        return [images]
    if hasattr(images, "__array__") and np.asarray(images).dtype.kind not in "OU":  # an array of paths is a list
        return images if np.ndim(images) == 4 else [images]
    return images


def _as_source(image: ImageLike) -> bytes | Image.Image:
    """What `evaluation_pixels` takes, from every type of image."""
    match image:
        case str() | os.PathLike():
            return read_file(image)
        case bytes() | bytearray() | memoryview():
            return bytes(image)
        case Image.Image():
            return image
    pixels = np.asarray(image) if hasattr(image, "__array__") else np.zeros(0)
    if pixels.dtype == np.uint8 and pixels.size and pixels.ndim > 1 and pixels.shape[2:] in ((), (3,)):
        return Image.fromarray(pixels)
    given = f"{pixels.dtype} {list(pixels.shape)}" if hasattr(image, "__array__") else type(image).__name__
    expected = "a path, bytes, a Pillow image, or uint8 pixels [H, W, 3] or [H, W]"
    raise UserError(f"predict: {given} is no image; expected {expected}.")


def _decode(image: ImageLike, preprocesses: list) -> Decoded:
    """Reads an image and applies each preprocessing to it."""
    path = os.fspath(image) if isinstance(image, (str, os.PathLike)) else None
    try:
        source = _as_source(image)
        return path, [evaluation_pixels(source, preprocess) for preprocess in preprocesses], None
    except UserError:
        raise
    except MemoryError:
        return path, [], "too large for the memory that is free"
    except FileNotFoundError as error:
        return path, [], "broken link" if path and os.path.islink(path) else bad_reason(error)
    except Exception as error:
        return path, [], bad_reason(error)


def read_file(path: str | os.PathLike) -> bytes:
    """Reads an image file; raises ImageError or OSError."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait forever
        raise ImageError("a folder" if os.path.isdir(path) else "not an ordinary file")
    content = Path(path).read_bytes()
    if not content:
        raise ImageError("empty file (zero bytes)")
    return content


def _map_ahead(pool: ThreadPoolExecutor, function: Callable, items: Iterator, limit: int) -> Iterator:
    """`map` in threads that starts at most `limit` items before the first result is taken."""
    futures = deque(pool.submit(function, item) for item in itertools.islice(items, limit))
    while futures:
        yield futures.popleft().result()
        futures.extend(pool.submit(function, item) for item in itertools.islice(items, 1))
