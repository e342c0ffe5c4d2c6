"""Plots of a report: a panel for every group and form."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import sections
from bench.groups import Group
from bench.plot import CALLS, COLORS, STYLES, label_log_x

MARKERS = "osD^vPX*"
N_COLUMN = 2


def write(path: Path, found: Sequence[Group]) -> None:
    """Draw the groups of one suite.

    Raises:
      ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    drawn = [(group, is_causal) for group in found for is_causal in group.forms]
    n_row, n_column = max(math.ceil(len(drawn) / N_COLUMN), 1), min(max(len(drawn), 1), N_COLUMN)
    figure = Figure(figsize=(6.8 * n_column, 5.4 * n_row), layout="constrained")
    panels = list(figure.subplots(n_row, n_column, squeeze=False).flat)
    for (group, is_causal), panel in zip(drawn, panels, strict=False):
        draw = _draw_trade if group.suite == "accuracy" else _draw_curves
        draw(panel, group, is_causal)
        panel.set_title(f"{group.title}\n{sections.FORMS[is_causal].lower()}", fontsize=8)
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=7)
    for panel in panels[len(drawn) :]:
        panel.axis("off")
    figure.savefig(path, dpi=130)


def _draw_curves(panel: Any, group: Group, is_causal: bool) -> None:
    key = "peak_bytes" if group.suite == "memory" else "ms_median"
    for number, curve in enumerate(group.curves(is_causal)):
        line, marker = STYLES.get(curve.backend, ("-", "o"))
        values = curve.values(lambda record: record[key])
        marker = MARKERS[number % len(MARKERS)] if curve.variant else marker
        color = COLORS.get(curve.mechanism)
        x, y = list(values), list(values.values())
        panel.loglog(x, y, line, marker=marker, markersize=4, color=color, label=curve.label)
    places = sorted({record[group.x_key] for record in group.records})
    panel.set_xticks(places, [f"{x // 1024}k" if x % 1024 == 0 else str(x) for x in places])
    panel.minorticks_off()
    panel.set_xlabel("codes" if group.x_key == "codes_k" else "tokens")
    call = CALLS.get(group.records[0]["direction"], "ms")
    panel.set_ylabel("peak bytes" if group.suite == "memory" else call)


def _draw_trade(panel: Any, group: Group, is_causal: bool) -> None:
    """Error to exact attention against time, a point for every mechanism and length."""
    found = sections.trade(group, group.curves(is_causal))
    for label in dict.fromkeys(name for name, _ in found):
        of_label = {length: of for (name, length), of in found.items() if name == label}
        ms = [sections.median(of, "ms_median") for of in of_label.values()]
        errors = [sections.median(of, "exact_error") for of in of_label.values()]
        color = COLORS.get(label.split()[0])
        panel.loglog(ms, errors, ":", marker="o", markersize=4, color=color, label=label)
        for length, x, y in zip(of_label, ms, errors, strict=True):
            panel.annotate(f"{length:,}", (x, y), fontsize=6)
    label_log_x(panel)
    panel.set_xlabel("one call, ms (median of layers)")
    panel.set_ylabel("relative error to exact attention (median of layers)")
