"""One report of any set of result files."""

from collections.abc import Sequence
from pathlib import Path

from bench import groups, panels, published, sections
from bench.groups import Group
from bench.sources import Source

TITLES = {
    "scaling": "Scaling with sequence length",
    "decode": "Decoding: one token against the context before it",
    "codebook": "Size of the codebooks",
    "memory": "Memory against sequence length",
    "accuracy": "Accuracy against time",
}
NAME = "report"
INTRODUCTION = (
    "Every table holds records of one file alone, so that whatever stands side by side was measured in one "
    "run. Times are medians; GB/s and TFLOP/s are of the bytes and operations that the definition needs, "
    "whatever a kernel moves or computes, and the floor is the least time that these take on the device."
)


def write(out: Path, found: Sequence[Source]) -> list[str]:
    """Write report.md and a plot for every suite into `out`; lines that say what was written."""
    out.mkdir(parents=True, exist_ok=True)
    by_suite = groups.groups(found)
    pages = ["# Benchmark report", INTRODUCTION, "## Where the figures are from", sections.provenance(found)]
    lines = []
    for suite in [*(name for name in TITLES if name in by_suite), *(by_suite.keys() - TITLES.keys())]:
        image, line = _plot(out, suite, by_suite[suite])
        lines.append(line)
        pages += [f"## {TITLES.get(suite, suite)}", image]
        for group in by_suite[suite]:
            pages += [part for part in sections.section(group) if part]
    beside = published.section(found)
    pages += [beside] if beside else []
    path = out / f"{NAME}.md"
    path.write_text("\n\n".join(pages) + "\n", encoding="utf-8")
    return [*lines, f"report: {path}"]


def _plot(out: Path, suite: str, found: Sequence[Group]) -> tuple[str, str]:
    """The image in Markdown, and a line that says where it is."""
    path = out / f"{NAME}-{suite}.png"
    try:
        panels.write(path, found)
    except ImportError:
        text = "matplotlib is not installed"
        return f"No plot: {text}.", f"no plot of {suite}: {text} (pip install matplotlib)"
    return f"![{TITLES.get(suite, suite)}]({path.name})", f"plot: {path}"
