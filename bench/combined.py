"""One report of any set of result files."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bench import groups, page, panels, published, sections
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
    parts = ["# Benchmark report", INTRODUCTION, "## Where the figures are from", sections.provenance(found)]
    lines = []
    for suite in [*(name for name in TITLES if name in by_suite), *(by_suite.keys() - TITLES.keys())]:
        title, of_suite = TITLES.get(suite, suite), by_suite[suite]
        image, line = page.image(
            out / f"{NAME}-{suite}.png", title, partial(panels.write, found=of_suite), f"plot of {suite}"
        )
        lines.append(line)
        parts += [f"## {title}", image]
        for group in of_suite:
            parts += sections.section(group)
    path = out / f"{NAME}.md"
    page.write(path, [*parts, published.section(found)])
    return [*lines, f"report: {path}"]
