"""Writes tables in markdown."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence


def head(title: str, columns: Iterable[str], align: str = "---:") -> str:
    """Returns the first two lines of a table; columns after the first are right-aligned."""
    columns = list(columns)
    return f"{line(title, columns)}\n|---|{f'{align}|' * len(columns)}"


def line(name: str, cells: Iterable[str]) -> str:
    """Returns a row."""
    return f"| {' | '.join([name, *cells])} |"


def table(
    title: str,
    columns: Sequence[str],
    rows: Mapping[str, Sequence[str]],
    best: Mapping[str, Callable[[Iterable[float]], float]] = {},
    align: str = "---:",
) -> str:
    """Returns a table. `best` maps a column to `min` or `max`: its best cells become bold."""
    lines = {name: list(cells) for name, cells in rows.items()}
    for column, choose in best.items():
        place = columns.index(column)
        numbers = {name: float(cells[place]) for name, cells in lines.items() if cells[place]}
        for name, number in numbers.items():
            if number == choose(numbers.values()):
                lines[name][place] = f"**{lines[name][place]}**"
    return "\n".join([head(title, columns, align), *(line(*row) for row in lines.items())])


def number(x: float | None, digits: int = 3) -> str:
    """Writes a few significant digits: 1990, 52.1, 0.446; with an exponent above a million."""
    if x is None:
        return ""
    if not abs(x) < 1e6:
        return f"{x:.{digits - 1}e}"
    size = math.floor(math.log10(abs(float(f"{x:.{digits - 1}e}")))) if x else 0
    return f"{round(x, digits - 1 - size):.{max(0, digits - 1 - size)}f}"


def megabytes(size: float) -> str:
    """Writes a size in units of a million bytes."""
    return f"{size / 1e6:,.1f}"
