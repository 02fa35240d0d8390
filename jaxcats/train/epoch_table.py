"""The epoch table: one line per epoch on a terminal, a growing HTML table in a notebook; and which epoch was the best."""

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxcats.common.stats import percent_digits, sentence

Row = Mapping[str, Any]  # see loop.TrainingLoop.end_epoch


def best_epoch(rows: Sequence[Row]) -> int:
    """The position of the epoch with the fewest validation errors, then the lowest validation loss."""
    return min(range(len(rows)), key=lambda i: (rows[i]["errors"], rows[i]["valid_loss"], i))


def overfitting(rows: Sequence[Row]) -> str | None:
    """A sentence where the validation loss has risen while the training loss kept falling; else None.

    Args:
        rows: of one phase, each with "epoch", "train_loss" and "valid_loss".
    """
    if not rows:
        return None
    best, last = min(rows, key=lambda row: row["valid_loss"]), rows[-1]
    # A rise of less than a twentieth is noise: with 1,000 images at 99 %, a loss is uncertain by 10 to 20 %.
    if last["valid_loss"] < 1.05 * best["valid_loss"] or not last["train_loss"] < best["train_loss"]:
        return None
    return (
        f"Overfitting: the validation loss was lowest after epoch {best['epoch']} ({best['valid_loss']:.4f}) and is now "
        f"{last['valid_loss']:.4f}, while the training loss fell from {best['train_loss']:.4f} to {last['train_loss']:.4f}."
    )


def user_metrics_text(row: Row) -> list[str]:
    """The metrics of the user after an epoch: ['f2 0.9912', ...]."""
    return [f"{name} {'-' if x is None else f'{x:.5g}'}" for name, x in row.get("metrics", {}).items()]


def table_head() -> str:
    """The names of the columns."""
    return (
        f"{'phase':>10} {'epoch':>5}   {'train loss':>10}  {'valid loss':>10}   {'errors':>6}    {'':7} "
        f"{'accuracy (95 % interval)':<31} {'time':>7}    {'images/s':>9}"
    )


def table_row(row: Row) -> str:
    """The line of an epoch, under `table_head`."""
    n, errors = row["n"], row["errors"]
    low, high = row["interval"]
    d = percent_digits(n)
    accuracy = f"{100 * (n - errors) / n:.{d}f} %  ({100 * low:.{d}f} to {100 * high:.{d}f})"
    line = (
        f"{row['phase']:>10} {row['epoch']:>5}   {row['train_loss']:>10.5f}  {row['valid_loss']:>10.5f}   "
        f"{errors:>6,} of {n:<7,} {accuracy:<31} {row['seconds']:>7.1f} s  {row['images_per_second']:>9,.0f}"
    )
    return "   ".join([line, *user_metrics_text(row)])


class Table:
    """Epochs as lines of text: `add` each row, `end` the phase."""

    def __init__(self, say: Callable[[str], None] = print):
        self.say, self.rows, self.head = say, list[Row](), table_head()

    def add(self, row: Row) -> None:
        """Shows an epoch."""
        if self.head:
            self.say(self.head)
            self.head = ""
        self.rows.append(row)
        self.say(table_row(row))

    def end(self) -> None:
        """Ends a phase: says whether it overfitted, and which of its epochs was the best."""
        if warning := overfitting(self.rows):
            best = self.rows[best_epoch(self.rows)]
            self.say(f"{warning} Fewest errors after epoch {best['epoch']}: {best['errors']:,}.")
        self.rows = []


class NotebookTable(Table):
    """The same as an HTML table that is updated in place."""

    def __init__(self):
        super().__init__(lambda text: None)
        self.handle = None

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.show()

    def end(self) -> None:
        if self.rows:
            self.show(best=best_epoch(self.rows), note=overfitting(self.rows))
        self.rows, self.handle = [], None

    def show(self, *, best: int | None = None, note: str | None = None) -> None:
        """Draws the table, the best epoch in bold, with a note below it."""
        from IPython.display import HTML, display

        table = HTML(to_html(self.rows, best=best, note=note))
        if self.handle is None:
            self.handle = display(table, display_id=True)
        else:
            self.handle.update(table)


def to_html(rows: Sequence[Row], *, best: int | None = None, note: str | None = None) -> str:
    """Rows of epochs as an HTML table; the row at position `best` is bold and marked."""
    heads = ("phase", "epoch", "train loss", "valid loss", "result", "time", "")
    lines = ["<table><thead><tr>", *(f"<th>{head}</th>" for head in heads), "</tr></thead><tbody>"]
    for i, row in enumerate(rows):
        style, mark = (" style='font-weight: bold'", ["best"]) if i == best else ("", [])
        losses = (f"{row[name]:.4f}" for name in ("train_loss", "valid_loss"))
        remarks = ", ".join([*mark, *user_metrics_text(row)])
        result = sentence(row["errors"], row["n"])
        cells = (row["phase"], row["epoch"], *losses, result, f"{row['seconds']:.1f} s", remarks)
        lines += [f"<tr{style}>", *(f"<td>{html.escape(str(cell))}</td>" for cell in cells), "</tr>"]
    return "".join([*lines, "</tbody></table>", f"<p>{html.escape(note)}</p>" if note else ""])
