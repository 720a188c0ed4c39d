"""Rows of `dlmctl stats` or `sae-order --summary` as a table in Markdown:

    python3 table.py FILE COLUMN…

A column that is a mean has its standard error behind it where the row has one; rows over everything
are left out.
"""

import json
import sys

file, *columns = sys.argv[1:]


def cell(row: dict, column: str) -> str:
    value = row.get(column, "")
    if not isinstance(value, float):
        return "" if value is None else str(value)
    error = row.get(f"{column}_se")
    return f"{value:.3g}" if error is None else f"{value:.3f} ± {error:.3f}"


print("|", " | ".join(columns), "|")
print("|", " | ".join("---" for _ in columns), "|")
with open(file) as lines:
    for row in map(json.loads, lines):
        if row.get(columns[0]) != "all":
            print("|", " | ".join(cell(row, column) for column in columns), "|")
