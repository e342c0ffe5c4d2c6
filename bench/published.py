"""The original project's two published tables, and our records at the same shapes beside them."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bench import markdown
from bench.records import Record
from bench.sources import Source

SOURCE = "the report of https://github.com/juanmuneton/vq_attn"
LABEL = (
    f"The columns named published are from {SOURCE}: measured on other hardware, without a valid baseline "
    "(its exact attention ran over the wrong axes), without waiting for the device or warming up, "
    "and with quantization not timed. They are no ratio to ours. Ours time quantization too; 'attention "
    "alone' is a call without the time to find its codes, empty where those take longer on their own."
)
WIDTH, CODES, SWEEP_LENGTH = 512, 128, 16384


class Published(NamedTuple):
    """Milliseconds of one forward call: batch 1, one head, width 512."""

    x: int  # tokens in the table of lengths, codes in the sweep
    causal: str  # digits as published
    full: str


LENGTHS = (
    Published(1024, "0.58", "0.60"),
    Published(16384, "5.2", "3.9"),
    Published(65536, "19.8", "15.0"),
    Published(262144, "79.2", "59.3"),
)
SWEEP = (
    Published(256, "2.6", "1.9"),
    Published(1024, "12.1", "9.5"),
    Published(4096, "93", "84"),
    Published(8192, "315", "296"),
)

COLUMNS = ("causal", "full", "causal, attention alone", "full, attention alone")


def section(found: Iterable[Source]) -> str:
    """Both tables beside our records; '' where there is none at these shapes."""
    ours = [record for source in found for record in source.records if _is_alike(record)]
    by_length = [record for record in ours if record["codes_k"] == CODES]
    by_codes = [record for record in ours if record["length"] == SWEEP_LENGTH]
    tables = [
        _beside(f"Time against length, {CODES} codes", "tokens", LENGTHS, by_length, "length"),
        _beside(f"Codebook sweep at {SWEEP_LENGTH:,} tokens", "codes", SWEEP, by_codes, "codes_k"),
    ]
    if not any(tables):
        return ""
    shape = f"Milliseconds of one forward call, batch 1, one head of width {WIDTH}."
    return "\n\n".join(
        filter(None, ["## Beside the original's published tables", f"{shape} {LABEL}", *tables])
    )


def _is_alike(record: Record) -> bool:
    """Whether a record has the shape of the published tables, apart from length and codes."""
    return (
        record["status"] == "ok"
        and (record["mechanism"], record["direction"]) == ("vq_qk", "fwd")
        and (record["batch"], record["heads"]) == (1, 1)
        and record["width"] == record["value_width"] == WIDTH
        and record["codes_q"] == record["codes_k"]
        and record["layer"] is None
    )


def _beside(
    title: str, x_name: str, published: Sequence[Published], ours: Sequence[Record], x_key: str
) -> str:
    places = {row.x for row in published}
    ours = [record for record in ours if record[x_key] in places]
    if not ours:
        return ""
    setups = dict.fromkeys((r["backend"], r["dtype"], r["device_name"]) for r in ours)
    head = [x_name, "published, causal", "published, full"]
    for setup in setups:
        head += [f"{', '.join(setup)}, {what}" for what in COLUMNS]
    rows = []
    for row in published:
        cells = [f"{row.x:,}", row.causal, row.full]
        for setup in setups:
            at = [
                r for r in ours if r[x_key] == row.x and (r["backend"], r["dtype"], r["device_name"]) == setup
            ]
            cells += _cells(at)
        rows.append(cells)
    return f"### {title}\n\n{markdown.filled(head, rows)}"


def _cells(at: Sequence[Record]) -> list[str]:
    newest = {record["is_causal"]: record for record in sorted(at, key=lambda record: str(record["time"]))}
    forms = [newest.get(is_causal) for is_causal in (True, False)]
    whole = [None if r is None else r["ms_median"] for r in forms]
    alone = [
        None if r is None or r["quantize_ms"] is None else r["ms_median"] - r["quantize_ms"] for r in forms
    ]
    # Finding the codes was timed in calls of its own, which can take longer than inside a short call.
    alone = [value if value is None or value > 0 else None for value in alone]
    return [markdown.milliseconds(value) for value in (*whole, *alone)]
