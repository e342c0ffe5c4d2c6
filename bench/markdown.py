"""Pieces of a Markdown page."""

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, figures to the right of a first column of names."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def milliseconds(value: float | None) -> str:
    """Three digits, or whole milliseconds where these are more; nothing for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def mebibytes(value: float | None) -> str:
    """Bytes as MiB, likewise."""
    return milliseconds(None if value is None else value / 2**20)
