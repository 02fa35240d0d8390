"""What can be read from a curve of losses under a growing learning rate: the average, four rules, and whether it moved.

The average and the rules are those of fastai 2.8 (fastai.callback.schedule), number for number, in float32 as there; see
tests/golden/lr_find.json. They take the points to judge as they are: which points those are, `LRFindResult.points` says.
"""

from collections.abc import Callable, Sequence

import numpy as np

# A level is the mean of this many batches. It counts as changed when it is this many standard errors from the mean of all
# batches before it (pure noise gets there in 2 to 3 tests of 100) and, downwards, this share of it: a fall too small to use.
WINDOW, STANDARD_ERRORS, SHARE = 10, 4.0, 0.01


def smooth(losses: Sequence[float] | np.ndarray, beta: float = 0.98) -> np.ndarray:
    """The exponential average a_i = beta a_{i-1} + (1 - beta) loss_i, divided by 1 - beta^i: float64 [m] -> [m]."""
    average, out = 0.0, np.empty(len(losses))
    for i, loss in enumerate(losses):
        average = beta * average + (1 - beta) * float(loss)
        out[i] = average / (1 - beta ** (i + 1))
    return out


def valley(lrs: np.ndarray, losses: np.ndarray) -> float:
    """The rate half-way down the longest valley (a strictly decreasing subsequence, gaps allowed): [m], [m] -> rate.

    Half is a third plus a sixth of the way, each rounded down, as fastai has it (Novetta's rule).
    """
    losses = np.asarray(losses, np.float32)
    length = np.ones(len(losses), int)  # of the longest strictly decreasing subsequence that ends here
    for i in range(1, len(losses)):
        length[i] = 1 + max(length[:i][losses[i] < losses[:i]], default=0)
    end = int(length.argmax())
    # One before the subsequence would start if it had no gaps: so in fastai, where -1 also means the last point.
    start = end - int(length[end]) if length[end] > 1 else 0
    third = (end - start) / 3
    return float(lrs[start + int(third) + int(third / 2)])


def steep(lrs: np.ndarray, losses: np.ndarray) -> float:
    """The rate where the loss falls fastest by the logarithm of the rate: [m], [m] -> rate."""
    losses = np.asarray(losses, np.float32)
    with np.errstate(invalid="ignore"):
        slopes = np.diff(losses) / np.diff(np.log(np.asarray(lrs, np.float32)))
    return float(lrs[int(slopes.argmin())])


def minimum(lrs: np.ndarray, losses: np.ndarray) -> float:
    """A tenth of the rate at the lowest loss: [m], [m] -> rate."""
    return float(lrs[int(np.asarray(losses, np.float32).argmin())]) / 10


def slide(lrs: np.ndarray, losses: np.ndarray) -> float:
    """The left end of a window of 15 steps that slides left while the slopes at its ends differ by more than 0.005.

    Slopes are losses by step (Gugger's rule in fastai). Raises IndexError with fewer than 16 points, as fastai does.
    """
    with np.errstate(invalid="ignore"):
        slope = np.gradient(np.asarray(losses, np.float32))
    right, left = len(losses) - 1, len(losses) - 16
    if left < 0:
        raise IndexError(f"slide needs 16 points, got {len(losses)}")
    found = left
    while left >= 0 and abs(slope[right] - slope[left]) > 0.005:
        found, right, left = left, right - 1, left - 1
    return float(lrs[found])


RULES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {f.__name__: f for f in (valley, steep, minimum, slide)}


def changes(losses: np.ndarray) -> tuple[int, int]:
    """Iterations (from 1) by which the raw losses had surely fallen and surely risen; 0 where they never did."""
    losses = losses[: int(np.isfinite(losses).argmin())] if not np.isfinite(losses).all() else losses
    fell = rose = 0
    for end in range(2 * WINDOW, len(losses) + 1):
        before, now = losses[: end - WINDOW], losses[end - WINDOW : end]
        # The deviation by successive differences, whose median neither a slope nor a few wild batches move.
        noise = 1.4826 / np.sqrt(2) * np.median(np.abs(np.diff(before)))
        error = noise * np.sqrt(1 / WINDOW + 1 / len(before))
        sure = max(STANDARD_ERRORS * error, SHARE * abs(before.mean()))
        change = now.mean() - before.mean()
        fell = fell or (end if change < -sure else 0)
        rose = rose or (end if change > sure else 0)
    return fell, rose
