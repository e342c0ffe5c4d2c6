"""The files of a report: a Markdown page, its plot, a summary in JSON."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.markdown import bullets
from bench.records import Record


def image(path: Path, about: str, draw: Callable[[Path], None], plot: str = "plot") -> tuple[str, str]:
    """Draw a plot where matplotlib is installed: the image in Markdown, and a line that says where it is."""
    try:
        draw(path)
    except ImportError:
        text = "matplotlib is not installed"
        return f"No plot: {text}.", f"no {plot}: {text} (pip install matplotlib)"
    return f"![{about}]({path.name})", f"plot: {path}"


def write(path: Path, sections: Iterable[str]) -> None:
    """Write those sections of a page that say something."""
    path.write_text("\n\n".join(filter(None, sections)) + "\n", encoding="utf-8")


def summarize(out: Path, summary: dict[str, Any]) -> None:
    """Write summary.json into `out`."""
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def not_measured(found: Iterable[Record], where: Callable[[Record], str]) -> str:
    """A line for every point without a figure: `where` names it, the record says why; '' without such."""
    lines = [f"{where(r)}: {r['reason']}" for r in found if r["status"] != "ok"]
    return f"## Not measured\n\n{bullets(lines)}" if lines else ""
