"""Pieces of a Markdown page."""

from collections.abc import Iterable, Sequence


def bullets(lines: Iterable[str]) -> str:
    """A list."""
    return "\n".join(f"- {line}" for line in lines)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], n_name: int = 1) -> str:
    """A table, figures to the right of `n_name` columns of names."""
    lines = [head, [*["---"] * n_name, *["---:"] * (len(head) - n_name)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def filled(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table without the columns in which no row has anything; '' without rows."""
    rows = list(rows)
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    return table([head[i] for i in kept], [[row[i] for i in kept] for row in rows]) if rows else ""


def milliseconds(value: float | None) -> str:
    """Three digits, or whole milliseconds where these are more; nothing for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def mebibytes(value: float | None) -> str:
    """Bytes as MiB, likewise."""
    return milliseconds(None if value is None else value / 2**20)


def ratio(value: float | None) -> str:
    """Two decimals; nothing for None."""
    return "" if value is None else f"{value:.2f}"


def error(value: float | None) -> str:
    """A relative error; nothing for None."""
    return "" if value is None else f"{value:.1e}" if 0 < value < 1e-2 else f"{value:.3f}"


def percent(value: float | None) -> str:
    """A share; nothing for None."""
    return "" if value is None else f"{100 * value:.3g} %"


def count(value: int | None) -> str:
    """With commas; nothing for None."""
    return "" if value is None else f"{value:,}"
