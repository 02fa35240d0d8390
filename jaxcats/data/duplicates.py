"""Pictures that look the same: candidates by a perceptual hash, each verified on small grey thumbnails."""

from collections.abc import Iterable

import numpy as np

# A pair must pass both. Of the 5 million pairs of 3,200 photos of cats and dogs one is a true pair (0 bits, 0.999); the
# next by correlation above 0.8 has 14 bits, the next by bits 0.87. Scaled and re-encoded copies stay under 4 bits.
MAX_BITS = 10
MIN_CORRELATION = 0.95
SIDE = 32


class Groups:
    """Which of N pictures belong together, joined a few at a time: N - 1 links say it, however many pairs there are."""

    def __init__(self, n: int):
        self.of = np.arange(n)

    def join(self, i: int, others: np.ndarray) -> np.ndarray:
        """One of `others` for each group among them that was not picture i's yet; these groups become one with it."""
        others = others[self.of[others] != self.of[i]]
        if len(others):
            groups, first = np.unique(self.of[others], return_index=True)
            others = others[np.sort(first)]
            self.of[np.isin(self.of, groups)] = self.of[i]
        return others


def group_of(n: int, links: Iterable[tuple[int, int]]) -> list[int]:
    """The number of each picture's group, by links of one kind or several."""
    partners: dict[int, list[int]] = {}
    for i, j in links:
        partners.setdefault(i, []).append(j)
    groups = Groups(n)
    for i, others in partners.items():
        groups.join(i, np.array(others))
    return groups.of.tolist()


def near_links(
    hashes: np.ndarray,
    thumbs: np.ndarray,
    *,
    bits: int = MAX_BITS,
    correlation: float = MIN_CORRELATION,
    block: int = 512,
) -> list[tuple[int, int, int, float]]:
    """(i, j, bits that differ, correlation of the thumbnails) of pairs i < j that look the same.

    Of many pictures that all look the same no pair is named that earlier ones have already joined.

    Args:
        hashes: uint64 [N], perceptual hashes.
        thumbs: uint8 [N, 32, 32], grey. Pairs are compared in blocks of rows: 11 x block x N bytes of memory at a time.
    """
    found, groups = [], Groups(len(hashes))
    flat = _unit(thumbs.reshape(len(thumbs), -1).astype(np.float32), centred=True)
    for start in range(0, len(hashes), block):
        distance = np.bitwise_count(hashes[start : start + block, None] ^ hashes[None, start:])
        close = np.triu(distance <= bits, 1)
        for row in np.flatnonzero(close.any(1)):
            i, others = start + int(row), start + np.flatnonzero(close[row])
            others = others[groups.of[others] != groups.of[i]]
            # In parts, as each holds 4 KB for every picture that is compared.
            alike = np.concatenate([flat[others[at : at + 4096]] @ flat[i] for at in range(0, len(others) + 1, 4096)])
            same = dict(zip(others.tolist(), alike.tolist(), strict=True))
            for j in groups.join(i, others[alike >= correlation]).tolist():
                found.append((i, j, int(distance[row, j - start]), same[j]))
    return found


def alike_features(features: np.ndarray, *, cosine: float, block: int = 1024) -> list[tuple[int, int, float]]:
    """(i, j, cosine) of pairs i < j of rows whose cosine is at least `cosine`, likewise none that is joined already.

    Args:
        features: float [N, F]; compared in blocks of rows: 4 x block x N bytes of memory at a time.
    """
    found, groups = [], Groups(len(features))
    unit = _unit(features.astype(np.float32), centred=False)
    for start in range(0, len(unit), block):
        products = unit[start : start + block] @ unit[start:].T
        close = np.triu(products >= cosine, 1)
        for row in np.flatnonzero(close.any(1)):
            i = start + int(row)
            for j in groups.join(i, start + np.flatnonzero(close[row])).tolist():
                found.append((i, j, float(products[row, j - start])))
    return found


def _unit(rows: np.ndarray, *, centred: bool) -> np.ndarray:
    if centred:
        rows = rows - rows.mean(1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)
