"""Images judged by an exported classifier; needs jax, flatbuffers, numpy, safetensors and Pillow only."""

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
from jaxcats.common.errors import RunError, UserError
from jaxcats.data.augment import PRESETS, make_augment, source_preprocess
from jaxcats.data.images import ImageError, Preprocess, bad_reason, evaluation_pixels
from jaxcats.export import artifact

Picture = str | os.PathLike | bytes | bytearray | memoryview | Image.Image | np.ndarray


@dataclass(frozen=True, eq=False)
class Prediction:
    """What is said of one image.

    Attributes:
        path: as given; None for an image that was no file.
        label: the likeliest class; None where the image can't be used.
        probability: of that class, calibrated.
        abstain: the probability is below the threshold that was chosen at export: better ask someone.
        error: why the image can't be used; None for a good one.
        probabilities: float32 [C]; NaN for a bad image.
    """

    path: str | None
    label: str | None
    probability: float
    abstain: bool
    error: str | None
    probabilities: np.ndarray

    def __repr__(self) -> str:
        said = self.error or f"{self.label} {self.probability:.4f}{' (unsure)' if self.abstain else ''}"
        return f"{self.path}: {said}" if self.path else said


class Predictions(Sequence[Prediction]):
    """One Prediction per image, in order, and the same as columns.

    Attributes:
        classes: names in the order of the probabilities.
        probabilities: float32 [n, C]; a row of NaN for a bad image.
        confidence: float32 [n], the highest of each row.
        labels, errors, paths: n of them, None where there is none.
        abstain: bool [n].
    """

    def __init__(self, rows: Sequence[Prediction], classes: tuple[str, ...]):
        self._rows, self.classes = list(rows), classes
        self.probabilities = np.array([r.probabilities for r in rows], np.float32).reshape(-1, len(classes))
        self.confidence = np.array([r.probability for r in rows], np.float32)
        self.labels = [r.label for r in rows]
        self.abstain = np.array([r.abstain for r in rows], bool)
        self.errors = [r.error for r in rows]
        self.paths = [r.path for r in rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, at: Any) -> Any:
        return Predictions(self._rows[at], self.classes) if isinstance(at, slice) else self._rows[at]

    def __repr__(self) -> str:
        more = [f"... and {len(self) - 20:,} more"] if len(self) > 20 else []
        return "\n".join([*map(repr, self._rows[:20]), *more]) or "no images"


def read_file(path: str | os.PathLike) -> bytes:
    """An image file's content; raises ImageError or OSError."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
        raise ImageError("a folder" if os.path.isdir(path) else "not an ordinary file")
    content = Path(path).read_bytes()
    if not content:
        raise ImageError("empty file (zero bytes)")
    return content


def _as_source(picture: Picture) -> bytes | Image.Image:
    """What evaluation_pixels takes, of anything that is an image."""
    if isinstance(picture, (str, os.PathLike)):
        return read_file(picture)
    if isinstance(picture, (bytes, bytearray, memoryview)):
        return bytes(picture)
    if isinstance(picture, Image.Image):
        return picture
    if not hasattr(picture, "__array__"):
        raise UserError(
            f"predict: a {type(picture).__name__} is no image; give a path, bytes, a Pillow image or an array."
        )
    pixels = np.asarray(picture)
    if (
        pixels.dtype != np.uint8
        or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3))
        or not pixels.size
    ):
        raise UserError(
            f"predict: an array of {pixels.dtype} {list(pixels.shape)} is no image; expected uint8 [H, W, 3] or [H, W]."
        )
    return Image.fromarray(pixels)


def _one_by_one(pictures: Any) -> Iterable[Picture]:
    """Any of what `predict` takes, as images."""
    if isinstance(pictures, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)):
        return [pictures]
    if hasattr(pictures, "__array__") and np.asarray(pictures).dtype.kind not in "OU":  # an array of paths is a list
        pixels = np.asarray(pictures)
        return pixels if pixels.ndim == 4 else [pixels]
    return pictures


class Classifier:
    """An exported classifier; `jaxcats.load(folder)` makes one.

    Attributes:
        classes: names in the order of the probabilities.
        threshold: probability below which a prediction abstains; None: it never does.
        facts: model.json's content.
    """

    def __init__(self, found: artifact.Artifact):
        self.facts, self.classes, self._preprocess = found.facts, found.classes, found.preprocess
        self.threshold = found.threshold
        self._folder, self._exported = found.folder, found.exported
        self._tensors = jax.device_put(found.tensors)
        self._compiled: dict[int, Callable[[Any, Any], jax.Array]] = {}

    @functools.cached_property
    def _changes(self) -> tuple[Preprocess, Callable]:
        """What an image goes through before it is changed for TTA, and the change: (sources, version, content) -> uint8."""
        how: Any = PRESETS[self.facts["tta"]["augment"]]
        change = make_augment(how, key=jax.random.key(zlib.crc32(b"tta")), size=self._preprocess.size)
        return source_preprocess(self._preprocess, how), jax.jit(
            lambda *args: jnp.round(change(*args)).astype(jnp.uint8)
        )

    def __repr__(self) -> str:
        measured = self.facts.get("accuracy")
        names = ", ".join(self.classes[:6]) + (", ..." if len(self.classes) > 6 else "")
        judged = f"; {measured['errors']:,} errors of {measured['n']:,} when exported" if measured else ""
        return f"Classifier: {self.facts['backbone']}, {len(self.classes)} classes ({names}){judged}"

    def predict(self, pictures: Any, *, batch_size: int = 32, tta: int = 0) -> Predictions:
        """Judges images, all of them; a bad one is a row with its reason.

        An image's numbers are its own: they are the same to 1e-5 whichever images come with it, in any order.

        Args:
            images: a path, bytes (a file's content), a Pillow image, a uint8 array [H, W, 3], [H, W] or [N, H, W, 3],
                or a list of these.
            batch_size: images per call of the network.
            tta: also judge so many randomly changed versions of each image and take the mean. What is changed depends
                on the image's pixels alone, so the draws are not those of `evaluate --tta`; besides, the changed pixels
                are rounded to whole numbers here and the probabilities calibrated before they are averaged. The rounding
                alone moves a probability by 0.0002 on average and by 0.003 at most, on photos.

        Raises:
            UserError: something in the list is no image at all.
        """
        return Predictions(list(self.stream(_one_by_one(pictures), batch_size=batch_size, tta=tta)), self.classes)

    def stream(self, pictures: Iterable[Picture], *, batch_size: int = 32, tta: int = 0) -> Iterator[Prediction]:
        """The same as `predict`, row by row, for more images than fit in memory: a few batches are held at a time."""
        for name, value, least in (("batch_size", batch_size, 1), ("tta", tta, 0)):
            if type(value) is not int or value < least:
                raise UserError(f"{name}: {value!r} can't be used; expected {least} or more.")
        return self._stream(pictures, batch_size, tta)

    def _stream(self, pictures: Iterable[Picture], batch_size: int, tta: int) -> Iterator[Prediction]:
        pool = ThreadPoolExecutor(os.cpu_count())
        try:
            decoded = _ahead(pool, lambda p: self._decode(p, tta > 0), iter(pictures), 2 * batch_size + 2)
            waiting = None  # answers are read one batch late, so that the device and the decoder overlap
            while batch := list(itertools.islice(decoded, batch_size)):
                answers = self._judge([pixels for _, pixels, _ in batch if pixels], batch_size, tta)
                if waiting:
                    yield from self._rows(*waiting)
                waiting = batch, answers
            if waiting:
                yield from self._rows(*waiting)
        finally:
            pool.shutdown(cancel_futures=True)

    def _decode(self, picture: Picture, tta: bool) -> tuple[str | None, tuple[np.ndarray, ...] | None, str | None]:
        """(path, pixels for the network and for TTA, reason why not)."""
        path = os.fspath(picture) if isinstance(picture, (str, os.PathLike)) else None
        try:
            source = _as_source(picture)
            wanted = (self._preprocess, self._changes[0]) if tta else (self._preprocess,)
            return path, tuple(evaluation_pixels(source, p) for p in wanted), None
        except UserError:
            raise
        except MemoryError:
            return path, None, "too large for the memory that is free"
        except FileNotFoundError as error:
            return path, None, "broken link" if path and os.path.islink(path) else bad_reason(error)
        except Exception as error:
            return path, None, bad_reason(error)

    def _judge(self, pixels: list[tuple[np.ndarray, ...]], batch_size: int, tta: int) -> Any:
        """Probabilities of a batch, on their way; rows beyond the images are padding."""
        if not pixels:
            return np.zeros((0, len(self.classes)), np.float32)
        # Three sizes at most, so that three programs at most are compiled. In bfloat16 the program for one image rounds
        # otherwise than those for several, by 0.003 in a probability.
        least = (1, 8) if self.facts["dtype"] == "float32" else (8,)
        size = min(s for s in (*least, max(batch_size, least[0])) if s >= len(pixels))
        pixels = pixels + [pixels[-1]] * (size - len(pixels))
        call = self._compiled.get(size) or self._compile(size)
        images = np.stack([p[0] for p in pixels])
        total = call(self._tensors, images)
        if tta:
            sources = np.stack([p[1] for p in pixels])
            content = np.array([zlib.crc32(p[0].tobytes()) >> 1 for p in pixels], np.int32)
            for version in range(tta):
                total = total + call(self._tensors, self._changes[1](sources, version, content))
        return total / (tta + 1)

    def _compile(self, size: int) -> Callable[[Any, Any], jax.Array]:
        try:
            self._compiled[size] = artifact.compile_for(self._exported, self._tensors, size)
        except ValueError as error:
            reason = (str(error).splitlines() or ["?"])[0]
            raise UserError(
                f"{self._folder}: can't be run on this machine's {jax.default_backend()}: {reason}."
            ) from None
        return self._compiled[size]

    def _rows(self, batch: list, answers: Any) -> Iterator[Prediction]:
        found = iter(np.asarray(answers))
        for path, pixels, error in batch:
            if pixels is None:
                yield Prediction(path, None, np.nan, False, error, np.full(len(self.classes), np.nan, np.float32))
                continue
            row = next(found)
            best = int(row.argmax())
            if not np.isfinite(row[best]):
                raise RunError(f"{self._folder}: the network's answers are not numbers; train and export it again.")
            sure = self.threshold is None or row[best] >= self.threshold
            yield Prediction(path, self.classes[best], float(row[best]), not sure, None, row)


def _ahead(pool: ThreadPoolExecutor, work: Callable, items: Iterator, ahead: int) -> Iterator:
    """`map` in threads that keeps at most so many results waiting."""
    waiting = deque(pool.submit(work, item) for item in itertools.islice(items, ahead))
    while waiting:
        yield waiting.popleft().result()
        waiting.extend(pool.submit(work, item) for item in itertools.islice(items, 1))


def load(folder: str | os.PathLike) -> Classifier:
    """An exported classifier, verified: the folder that `train` or `export` wrote, or a run folder with one in it.

    Raises:
        UserError: not such a folder, or a damaged one; it names the file and the reason.

    >>> classifier = jaxcats.load("runs/x/model")
    >>> classifier.predict(["a.jpg", "b.jpg"]).labels
    ['cats', 'dogs']
    """
    compile_cache.enable_compilation_cache()
    return Classifier(artifact.read(folder))
