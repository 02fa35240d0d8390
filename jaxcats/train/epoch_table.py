"""Counts, and how far they can be trusted."""

import html
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxcats.common import stats
from jaxcats.common.stats import percent_digits

if TYPE_CHECKING:
    pass


def table_row(row: Mapping[str, Any]) -> str:
    """One line of the epoch table, under `table_head`."""
    n, errors = row["n"], row["errors"]
    low, high = row["interval"]
    d = percent_digits(n)
    accuracy = f"{100 * (n - errors) / n:.{d}f} %  ({100 * low:.{d}f} to {100 * high:.{d}f})"
    return (
        f"{row['phase']:>10} {row['epoch']:>5}   {row['train_loss']:>10.5f}  {row['valid_loss']:>10.5f}   "
        f"{errors:>6,} of {n:<7,} {accuracy:<31} {row['seconds']:>7.1f} s  {row['images_per_second']:>9,.0f}"
        + "".join(f"   {part}" for part in own_words(row))
    )


def own_words(row: Mapping[str, Any]) -> list[str]:
    """What a function of one's own measured after an epoch: ['f2 0.9912', ...]."""
    return [f"{name} {'-' if x is None else f'{x:.5g}'}" for name, x in row.get("metrics", {}).items()]


def table_head() -> str:
    """Names of the columns of the epoch table."""
    return (
        f"{'phase':>10} {'epoch':>5}   {'train loss':>10}  {'valid loss':>10}   {'errors':>6}    {'':7} "
        f"{'accuracy (95 % interval)':<31} {'time':>7}    {'images/s':>9}"
    )


def best_epoch(rows: Sequence[Mapping[str, Any]]) -> int:
    """The place of the epoch with the fewest validation errors, then the lowest validation loss."""
    return min(range(len(rows)), key=lambda i: (rows[i]["errors"], rows[i]["valid_loss"], i))


def overfitting(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """A sentence, where the validation loss has turned up while the training loss went on falling; else None.

    Args:
        rows: of one phase, each with "epoch", "train_loss" and "valid_loss".
    """
    if not rows:
        return None
    low = min(range(len(rows)), key=lambda i: rows[i]["valid_loss"])
    least, last = rows[low], rows[-1]
    # A rise of less than a twentieth is noise: of 1,000 images at 99 %, a loss is known to a tenth or two.
    if last["valid_loss"] < 1.05 * least["valid_loss"] or not last["train_loss"] < least["train_loss"]:
        return None
    return (
        f"Overfitting: the validation loss was lowest after epoch {least['epoch']} ({least['valid_loss']:.4f}) and is "
        f"{last['valid_loss']:.4f} now, while the training loss fell from {least['train_loss']:.4f} to {last['train_loss']:.4f}."
    )


class Table:
    """Epochs as lines of text: `add` each row, `end` the phase."""

    def __init__(self, say: Callable[[str], None] = print):
        self.say, self.rows, self.headed = say, list[Mapping[str, Any]](), False

    def add(self, row: Mapping[str, Any]) -> None:
        """Shows one more epoch; see fit.Fitter.end_epoch for its keys."""
        if not self.headed:
            self.say(table_head())
            self.headed = True
        self.rows.append(row)
        self.say(table_row(row))

    def end(self) -> None:
        """Ends a phase: marks its best epoch, and says when it overfitted."""
        warning = overfitting(self.rows)
        if warning:
            best = self.rows[best_epoch(self.rows)]
            self.say(f"{warning} Fewest errors after epoch {best['epoch']}: {best['errors']:,}.")
        self.rows = []


class NotebookTable(Table):
    """The same as an HTML table that grows in its place."""

    def __init__(self):
        super().__init__(lambda text: None)
        self.shown = None

    def add(self, row: Mapping[str, Any]) -> None:
        super().add(row)
        self.show()

    def end(self) -> None:
        if self.rows:
            self.show(best=best_epoch(self.rows), note=overfitting(self.rows))
        self.rows, self.shown = [], None

    def show(self, *, best: int | None = None, note: str | None = None) -> None:
        """Draws the table, the best epoch in bold, with a note under it."""
        from IPython.display import HTML, display

        text = HTML(to_html(self.rows, best=best, note=note))
        if self.shown is None:
            self.shown = display(text, display_id=True)
        else:
            self.shown.update(text)


def to_html(rows: Sequence[Mapping[str, Any]], *, best: int | None = None, note: str | None = None) -> str:
    """Rows of epochs as an HTML table; the row at `best` is bold and says so."""
    heads = ("phase", "epoch", "train loss", "valid loss", "result", "time", "")
    lines = ["<table><thead><tr>" + "".join(f"<th>{h}</th>" for h in heads) + "</tr></thead><tbody>"]
    for i, row in enumerate(rows):
        cells = (
            row["phase"],
            row["epoch"],
            f"{row['train_loss']:.4f}",
            f"{row['valid_loss']:.4f}",
            stats.sentence(row["errors"], row["n"]),
            f"{row['seconds']:.1f} s",
            ", ".join(["best"] * (i == best) + own_words(row)),
        )
        style = " style='font-weight: bold'" if i == best else ""
        lines.append(f"<tr{style}>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in cells) + "</tr>")
    return "".join(lines) + "</tbody></table>" + (f"<p>{html.escape(note)}</p>" if note else "")
