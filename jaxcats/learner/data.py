"""The images of a notebook: `ImageClassifierData`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxcats import plots
from jaxcats.common.config import Columns, Config, DataConfig
from jaxcats.common.errors import UserError
from jaxcats.common.io import cache_folder
from jaxcats.data import augment
from jaxcats.data.files import list_images
from jaxcats.data.images import Preprocess, evaluation_pixels
from jaxcats.data.index import FolderIndex, Split, scan_unlabelled
from jaxcats.train.experiment import augment_key, index_images

SIZE = 224  # of the shown images, until a network sets another size


@dataclass(eq=False)
class ImageClassifierData:
    """A dataset: training and validation images with labels, and perhaps images without labels to predict on.

    Make it with `ImageClassifierData.from_paths`.

    Attributes:
        index: the images of the folder, their labels and splits.
        settings: the `data` section of a configuration.
        batch_size: images per training step.
        augment: preset for training images when features are not precomputed: none, flip, crop, side_on, top_down.
        seed: of everything random.
        test: images without labels, if there are any.
    """

    index: FolderIndex
    settings: DataConfig
    batch_size: int = 64
    augment: str = "none"
    seed: int = 0
    test: Split | None = field(default=None, repr=False)

    @classmethod
    def from_paths(
        cls,
        path: str | Path,
        *,
        size: int | None = None,
        batch_size: int = 64,
        augment: str = "none",
        test: str | None = "test1",
        labels: str = "folders",
        columns: Mapping[str, str] | None = None,
        group: str | None = None,
        valid_fraction: float | None = None,
        test_fraction: float | None = None,
        split_seed: int = 0,
        manifest: str | Path | None = None,
        on_bad_file: Literal["skip", "fail"] = "skip",
        policy: Literal["lesson", "weights"] = "lesson",
        seed: int = 0,
        workers: int | None = None,
    ) -> "ImageClassifierData":
        """Reads and checks every image under a folder once; the files are never changed.

        Args:
            path: holds train/ and valid/ (or val/, validation/) with a folder per class; or class folders, with
                `valid_fraction`.
            size: side of the square that the network sees, in pixels; None: what its weights were trained with.
            batch_size: images per training step.
            augment: none, flip, crop, side_on (photos taken from the side) or top_down (from above).
            test: folder in `path` of images without labels; ignored if it does not exist.
            labels: folders; parent: the folder that an image lies in, at any depth; a regular expression with
                (?P<label>...) on the path; or a .csv, .tsv or .parquet file.
            columns: other names for the columns "path", "label" and "split" of that file.
            group: which images stay in one split together: a regular expression with (?P<group>...) on the
                path, or a column of that file.
            valid_fraction: share of each class for validation when neither a valid/ folder nor that file gives a split.
            test_fraction: share of each class for `learn.predict("test")`, when there is no test folder.
            split_seed: of the random split.
            manifest: file that records the random split, and is read when it exists; None: in the cache folder.
            on_bad_file: skip: unusable files are left out and counted; fail: they are an error.
            policy: lesson: shorter side to size, centre crop; weights: as the network's weights were measured.
            seed: of everything random.
            workers: decoding threads; None: one per core.

        Raises:
            UserError: the folder cannot be trained on; the message says what was looked for.
        """
        d = DataConfig(
            root=str(path),
            size=size,
            policy=policy,
            labels=labels,
            columns=Columns(**columns or {}),
            group=group,
            valid_fraction=valid_fraction,
            test_fraction=test_fraction,
            split_seed=split_seed,
            manifest=str(manifest) if manifest else None,
            on_bad_file=on_bad_file,
            workers=workers,
        )
        index = index_images(Config(data=d, seed=seed), cache_folder())
        if test in index.classes:
            raise UserError(
                f"{path}: {test} lies among the class folders, so it is read as a class; move it, or give test=None."
            )
        folder = Path(path).expanduser() / test if test else None
        unlabelled = index.test
        if folder and folder.is_dir() and list_images(folder, folder):
            unlabelled = scan_unlabelled(folder, workers=workers)[0]
        return cls(index, d, batch_size, augment, seed, unlabelled)

    def __post_init__(self):
        if self.augment not in augment.PRESETS:
            raise UserError(f"augment: {self.augment!r} is not one of {', '.join(augment.PRESETS)}.")

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(self.split(name)):,} {name}" for name in self.names())
        bad = f"; {len(self.index.bad)} files can't be used" if self.index.bad else ""
        return f"ImageClassifierData({self.settings.root}: {counts} images in {len(self.classes)} classes{bad})"

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels."""
        return self.index.classes

    @property
    def trn_y(self) -> np.ndarray:
        """Labels of the training images, int32 [n]."""
        return self.index.splits["train"].labels

    @property
    def val_y(self) -> np.ndarray:
        """Labels of the validation images, int32 [n], in the order of `learn.predict()`."""
        return self.index.splits["valid"].labels

    @property
    def trn_paths(self) -> list[Path]:
        """Files of the training images."""
        return self.files("train")

    @property
    def val_paths(self) -> list[Path]:
        """Files of the validation images, in the order of `val_y`."""
        return self.files("valid")

    @property
    def test_paths(self) -> list[Path]:
        """Files of the images without labels, in the order of `learn.predict("test")`."""
        return self.files("test")

    def names(self) -> list[str]:
        """Which of train, valid and test there are."""
        return [*self.index.splits, *(["test"] if self.test else [])]

    def split(self, name: str) -> Split:
        """The images named train, valid or test."""
        if name == "test" and self.test is not None:
            return self.test
        if name not in self.index.splits:
            raise UserError(f"There are no '{name}' images; there are {', '.join(self.names())}.")
        return self.index.splits[name]

    def files(self, name: str) -> list[Path]:
        """Files of train, valid or test, in order."""
        split = self.split(name)
        return [Path(split.root) / p for p in split.paths]

    def show_batch(self, n: int = 8, *, seed: int = 0) -> plots.Figure:
        """n training images as the network sees them in training, with their classes."""
        rows = np.random.default_rng(seed).permutation(len(self.trn_y))[: max(n, 1)]
        titles = [self.classes[self.trn_y[row]] for row in rows]
        return plots.gallery(self.training_pixels(rows), titles, wrong=[False] * len(rows))

    def show_augmented(self, row: int = 0, n: int = 8) -> plots.Figure:
        """One training image as n epochs would show it, under `augment`."""
        if not 0 <= row < len(self.trn_y):
            raise UserError(f"row {row}: there are {len(self.trn_y):,} training images, 0 to {len(self.trn_y) - 1:,}.")
        pixels = [self.training_pixels([row], epoch=epoch)[0] for epoch in range(n)]
        titles = [f"epoch {epoch}" for epoch in range(n)]
        return plots.gallery(pixels, titles, wrong=[False] * n, heading=f"augment: {self.augment}")

    def training_pixels(self, rows: Sequence[int] | np.ndarray, *, epoch: int = 0) -> list[np.ndarray]:
        """Training images after augmentation, uint8 [size, size, 3] each."""
        preprocess = Preprocess(size=self.settings.size or SIZE, policy=self.settings.policy)
        preset = augment.PRESETS[self.augment]
        source, files = augment.source_preprocess(preprocess, preset), self.trn_paths
        images: Any = np.stack([evaluation_pixels(files[row], source) for row in rows])
        if preset is not None:
            # The draws of a training run with this seed: `experiment.make_phase` derives its key in the same way.
            change = augment.make_augment(preset, key=augment_key(jax.random.key(self.seed)), size=preprocess.size)
            images = jax.jit(change)(images, jnp.int32(epoch), jnp.asarray(rows, jnp.int32))
        return list(np.clip(np.round(np.asarray(images, np.float32)), 0, 255).astype(np.uint8))
