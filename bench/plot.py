"""The log-log plot of time against length."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import fit
from bench.records import Record
from bench.registry import MECHANISMS

COLORS = {
    "vq_qk": "#1b6ca8",
    "vq_qk_xla": "#7fb3d5",
    "vq_k": "#3aa17e",
    "vq_qk_window": "#6a51a3",
    "vq_k_window": "#8c8c3a",
    "exact_window": "#777777",
    "hyper": "#c9802b",
    "exact": "#b03a48",
    "exact_cudnn": "#8e2f7b",
    "exact_xla": "#d98880",
    "exact_flash": "#e05a33",
    "exact_efficient": "#a6785a",
    "exact_math": "#5c5c5c",
}
CALLS = {
    "fwd": "one forward call, ms",
    "bwd": "one backward call, ms",
    "fwd+bwd": "forward and backward, ms",
    "step": "one token, ms",
}
MOST_TICKS = 7  # whose labels stay apart in a panel
STYLES = {"jax": ("-", "o"), "torch": ("--", "s")}


def write(path: Path, found: Sequence[Record]) -> None:
    """One panel per form (causal or not), one line per mechanism and backend.

    Raises:
      ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    measured = fit.curves(found)
    slopes = {item[:3]: item.exponent for item in fit.fits(measured)}
    forms = sorted({name[2] for name in measured}) or [False]
    figure = Figure(figsize=(6.2 * len(forms), 5.2), layout="constrained")
    panels = figure.subplots(1, len(forms), sharey=True, squeeze=False)
    for is_causal, panel in zip(forms, panels[0], strict=True):
        for (framework, mechanism, form), curve in measured.items():
            if form != is_causal:
                continue
            name = framework, mechanism, form
            line, marker = STYLES[framework]
            slope = f"  T^{slopes[name]:.2f}" if name in slopes else ""
            panel.loglog(
                list(curve),
                list(curve.values()),
                line,
                marker=marker,
                markersize=4,
                color=COLORS[mechanism],
                label=f"{MECHANISMS[mechanism].title}, {framework}{slope}",
            )
        lengths = sorted({T for name, curve in measured.items() if name[2] == is_causal for T in curve})
        panel.set_xticks(lengths, [f"{T // 1024}k" if T % 1024 == 0 else str(T) for T in lengths])
        panel.minorticks_off()
        panel.set_title("causal" if is_causal else "not causal")
        is_step = any(record["direction"] == "step" for record in found)
        panel.set_xlabel("context T, tokens" if is_step else "sequence length T, tokens")
        panel.grid(alpha=0.3)
        if lengths:
            panel.legend(fontsize=7.5)
    panels[0][0].set_ylabel(CALLS[found[0]["direction"] if found else "fwd"])
    figure.suptitle(subtitle(found), fontsize=9)
    figure.savefig(path, dpi=150)


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers for a logarithmic axis: the fewest of one kind of which there are three or more."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7), [n / 10 for n in range(10, 100)]):
        every = (step * 10.0**power for power in powers for step in steps)
        found = [tick for tick in every if low <= tick <= high]
        if len(found) >= 3:
            break
    return found[:: -(-len(found) // MOST_TICKS)] if len(found) > 1 else [low, high]


def label_log_x(axis: Any) -> None:
    """Few ticks with plain numbers on the logarithmic x of a panel; matplotlib's own overlap."""
    ticks = log_ticks(*axis.get_xlim())
    axis.set_xticks(ticks, [f"{tick:.4g}" for tick in ticks])
    axis.set_xticks([], minor=True)


def subtitle(found: Sequence[Record], *, has_codes: bool = True) -> str:
    """What was measured, on what."""
    if not found:
        return "nothing was measured"
    r = found[0]
    devices = " / ".join(dict.fromkeys(record["device_name"] for record in found))
    shape = f"B {r['batch']}, H {r['heads']}, D {r['width']}, V {r['value_width']}"
    shape += f", {r['codes_k']} codes" if has_codes else f", T {r['length']:,}"
    return f"{devices}; {shape}, {r['dtype']}, {r['input']} input; commit {r['commit'][:12]}"
