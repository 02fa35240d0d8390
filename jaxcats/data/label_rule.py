"""What `data.labels` and `data.group` may say; read with the configuration, so without Pillow."""

import re

from jaxcats.data.table import TABLES
from jaxcats.errors import UserError

WAYS = "folders, parent, a regular expression with (?P<label>...), or a .csv, .tsv or .parquet file"


def way(labels: str) -> str:
    """Which of "folders", "parent", "pattern" and "table" a `labels` means; UserError for none of them."""
    if labels in ("folders", "parent"):
        return labels
    if labels.lower().endswith(TABLES):
        return "table"
    if "(?P<" in labels:
        compiled(labels, "label", "data.labels")
        return "pattern"
    raise UserError(f"data.labels: {labels!r} can't be used; expected {WAYS}.")


def check_labels(labels: str, group: str | None) -> None:
    """UserError for values of data.labels and data.group that no folder can have."""
    kind = way(labels)
    if group is not None and "(?P<" in group:
        compiled(group, "group", "data.group")
    elif group is not None and kind != "table":
        raise UserError(
            f"data.group: {group!r} can't be used; expected a regular expression with (?P<group>...), or a column where "
            f"data.labels is a table."
        )


def compiled(pattern: str, name: str, key: str) -> re.Pattern[str]:
    """The regular expression; UserError when it is none or has no group of that name."""
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise UserError(f"{key}: {pattern!r} is no regular expression ({error}).") from None
    if name not in found.groupindex:
        raise UserError(f"{key}: {pattern!r} has no group (?P<{name}>...), which says what the {name} is.")
    return found
