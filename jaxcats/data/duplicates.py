"""Pictures that look the same: candidates by a perceptual hash, each verified on small grey thumbnails."""

import numpy as np

# A pair must pass both. Of the 5 million pairs of 3,200 photos of cats and dogs one is a true pair (0 bits, 0.999); the
# next by correlation above 0.8 has 14 bits, the next by bits 0.87. Scaled and re-encoded copies stay under 4 bits.
MAX_BITS = 10
MIN_CORRELATION = 0.95
SIDE = 32


def near_pairs(
    hashes: np.ndarray,
    thumbs: np.ndarray,
    *,
    bits: int = MAX_BITS,
    correlation: float = MIN_CORRELATION,
    block: int = 512,
) -> list[tuple[int, int, int, float]]:
    """(i, j, bits that differ, correlation of the thumbnails) of each pair i < j that looks the same.

    Args:
        hashes: uint64 [N], perceptual hashes.
        thumbs: uint8 [N, 32, 32], grey. Pairs are compared in blocks of rows: block x N bytes of memory at a time.
    """
    found = []
    flat = _unit(thumbs.reshape(len(thumbs), -1).astype(np.float32), centred=True)
    for start in range(0, len(hashes), block):
        distance = np.bitwise_count(hashes[start : start + block, None] ^ hashes[None, start:])
        for row, column in np.argwhere(distance <= bits):
            i, j = start + int(row), start + int(column)
            if i < j and (alike := float(flat[i] @ flat[j])) >= correlation:
                found.append((i, j, int(distance[row, column]), alike))
    return found


def alike_features(features: np.ndarray, *, cosine: float, block: int = 1024) -> list[tuple[int, int, float]]:
    """(i, j, cosine) of each pair i < j of rows whose cosine is at least `cosine`.

    Args:
        features: float [N, F]; compared in blocks of rows: 4 x block x N bytes of memory at a time.
    """
    found = []
    unit = _unit(features.astype(np.float32), centred=False)
    for start in range(0, len(unit), block):
        products = unit[start : start + block] @ unit[start:].T
        for row, column in np.argwhere(products >= cosine):
            if row < column:
                found.append((start + int(row), start + int(column), float(products[row, column])))
    return found


def _unit(rows: np.ndarray, *, centred: bool) -> np.ndarray:
    if centred:
        rows = rows - rows.mean(1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)
