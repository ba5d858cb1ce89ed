"""What a results file says, its rows by kind; reads no more than JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]  # a dataclass as engine.as_json wrote it: fields that were None are missing


class Results(NamedTuple):
    """Where it was measured, and the rows of all items in order."""

    environment: Row
    rows: list[Row]

    @property
    def facts(self) -> dict[str, Row]:
        """comparison.Facts by problem; the last one counts where a problem was run again."""
        return {row["problem"]: row for row in self.rows if "facts" in row}

    @property
    def timings(self) -> list[Row]:
        """comparison.Timing."""
        return [row for row in self.rows if "provider" in row]

    @property
    def figures(self) -> dict[str, Row]:
        """measure.Row by what it is of."""
        return {row["what"]: row for row in self.rows if "what" in row}

    @property
    def points(self) -> list[Row]:
        """growth.Point."""
        return [row for row in self.rows if "subject" in row]


def load(path: Path) -> Results:
    """A file that engine.write wrote.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or something else.
    """
    try:
        known = json.loads(path.read_text())
        rows = [row for item in known["items"].values() for row in item["rows"]]
        return Results(known["environment"], rows)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a results file of this suite: {error!r}") from error
