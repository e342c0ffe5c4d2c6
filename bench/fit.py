"""Numbers read off measured curves: exponents, ratios to exact attention, crossovers, agreement."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bench.job import STEP
from bench.ledger import refusals
from bench.records import Record
from bench.registry import BACKENDS, position
from bench.verify import twin_limit

FIT_FROM = 4096  # shorter calls are overhead rather than work
MIN_FIT = 3
EXPONENT_LIMIT = 0.25  # how far apart the exponents of two backends may be
HOST_SHARE = 0.8  # of a call's time

# What is compared of two backends, by direction.
COMPARED = {"bwd": "gradients", "fwd+bwd": "outputs and gradients"}

Name = tuple[str, str, bool]  # backend, mechanism, is_causal
Curve = Mapping[int, float]  # length to milliseconds


class Fit(NamedTuple):
    """`time ~ T ** exponent` over `lengths`."""

    backend: str
    mechanism: str
    is_causal: bool
    exponent: float
    lengths: tuple[int, ...]


class Crossover(NamedTuple):
    """From which length on a mechanism is faster than exact attention; None with a text that says why."""

    backend: str
    mechanism: str
    is_causal: bool
    length: float | None
    text: str


class Ratio(NamedTuple):
    """Time of exact attention over that of a mechanism, both of one run: above 1 it is faster."""

    backend: str
    mechanism: str
    is_causal: bool
    length: int
    ratio: float


class Agreement(NamedTuple):
    """Of two backends; None where nothing could be compared."""

    outputs: float | None
    outputs_limit: float | None
    exponents: float | None
    worst: str
    refused: tuple[str, ...]
    not_compared: tuple[str, ...]


def curve_name(mechanism: str, is_causal: bool) -> str:
    """As 'vq_qk causal'."""
    return f"{mechanism} {'causal' if is_causal else 'full'}"


def curves(records: Iterable[Record], figure: str = "ms_median") -> dict[Name, dict[int, Any]]:
    """A figure by length of everything that was measured, in the order of the registry."""
    found: dict[Name, dict[int, Any]] = {}
    for record in sorted(records, key=lambda r: r["length"]):
        if record["status"] == "ok":
            name = record["backend"], record["mechanism"], record["is_causal"]
            found.setdefault(name, {})[record["length"]] = record[figure]
    return dict(sorted(found.items(), key=lambda item: (position(item[0][1]), item[0][2], item[0][0])))


def waits_for_host(record: Record) -> bool:
    """Whether a call took about as long as the host needs to enqueue it: its time is not the device's."""
    dispatch_ms, ms = record["dispatch_ms"], record["ms_median"]
    return ms is not None and dispatch_ms is not None and dispatch_ms > HOST_SHARE * ms


def exponent(lengths: Sequence[int], values: Sequence[float]) -> float:
    """Slope of the least-squares line through `(log T, log value)`."""
    slope, _ = np.polyfit(np.log(lengths), np.log(values), 1)
    return float(slope)


def fit_lengths(lengths: Iterable[int]) -> tuple[int, ...]:
    """Those of at least `FIT_FROM`; all when these are fewer than `MIN_FIT`."""
    lengths = tuple(sorted(lengths))
    long = tuple(length for length in lengths if length >= FIT_FROM)
    return long if len(long) >= MIN_FIT else lengths


def fits(measured: Mapping[Name, Curve]) -> list[Fit]:
    """An exponent for every curve of at least two lengths."""
    found = []
    for (backend, mechanism, is_causal), curve in measured.items():
        lengths = fit_lengths(curve)
        if len(lengths) >= 2:
            slope = exponent(lengths, [curve[length] for length in lengths])
            found.append(Fit(backend, mechanism, is_causal, slope, lengths))
    return found


def ratios(measured: Mapping[Name, Curve]) -> list[Ratio]:
    """Exact attention over every other mechanism, wherever both were measured."""
    found = []
    for (backend, mechanism, is_causal), curve in measured.items():
        exact = measured.get((backend, "exact", is_causal), {})
        if mechanism != "exact":
            common = (length for length in curve if length in exact)
            found += [Ratio(backend, mechanism, is_causal, T, exact[T] / curve[T]) for T in common]
    return found


def crossovers(measured: Mapping[Name, Curve]) -> list[Crossover]:
    """Where every mechanism overtakes exact attention of the same backend and form."""
    found = []
    for (backend, mechanism, is_causal), curve in measured.items():
        exact = measured.get((backend, "exact", is_causal), {})
        if mechanism != "exact":
            found.append(Crossover(backend, mechanism, is_causal, *_crossover(curve, exact)))
    return found


def _crossover(curve: Curve, exact: Curve) -> tuple[float | None, str]:
    """The last change of lead, interpolated on log-log axes between the lengths around it."""
    common = sorted(curve.keys() & exact.keys())
    if not common:
        return None, "no common length"
    lead = [math.log(exact[length] / curve[length]) for length in common]
    if lead[-1] <= 0:
        return None, f"beyond {common[-1]:,}"
    for (low, before), (high, after) in reversed(list(itertools.pairwise(zip(common, lead, strict=True)))):
        if before <= 0:
            length = low * (high / low) ** (-before / (after - before))
            return length, f"{length:,.0f}"
    return None, f"below {common[0]:,}"


def agreement(records: Sequence[Record], *, has_exponents: bool = True) -> Agreement | None:
    """How well the two backends agree; None when records are of one alone.

    Without `has_exponents`, times are not looked at.
    """
    present = {record["backend"] for record in records}
    if not present.issuperset(BACKENDS):
        return None
    measured = curves(record for record in records if not waits_for_host(record))
    forms = sorted({(record["mechanism"], record["is_causal"]) for record in records})
    refused: list[str] = []
    output_errors: dict[str, float] = {}
    exponent_errors: dict[str, float] = {}
    for mechanism, is_causal in forms:
        name = curve_name(mechanism, is_causal)
        of_form = [r for r in records if (r["mechanism"], r["is_causal"]) == (mechanism, is_causal)]
        refused += [f"{record['backend']} {name}" for record in refusals(of_form)]
        errors = [r["twin_error"] for r in of_form if r["twin_error"] is not None]
        pair = [measured.get((backend, mechanism, is_causal), {}) for backend in BACKENDS]
        # A step takes microseconds of a framework's own time, at a short context and often at a long one.
        is_step = any(record["direction"] == STEP for record in of_form)
        apart = None if is_step or not has_exponents else _exponents_apart(*pair)
        if errors:
            output_errors[name] = max(errors)
        if apart is not None:
            exponent_errors[name] = apart
    names = [curve_name(*form) for form in forms]
    worst = max(exponent_errors, key=lambda name: exponent_errors[name], default="")
    return Agreement(
        outputs=max(output_errors.values(), default=None),
        outputs_limit=max((twin_limit(r["dtype"], r["direction"]) for r in records), default=None),
        exponents=max(exponent_errors.values(), default=None),
        worst=worst,
        refused=tuple(sorted(set(refused))),
        not_compared=_missing(_compared(records), names, output_errors)
        + (_missing("exponents", names, exponent_errors) if has_exponents else ()),
    )


def _missing(what: str, names: Sequence[str], found: Mapping[str, float]) -> tuple[str, ...]:
    lacking = [name for name in names if name not in found]
    if lacking and not found:
        return (what,)
    return (f"{what} of {', '.join(lacking)}",) if lacking else ()


def _exponents_apart(first: Curve, second: Curve) -> float | None:
    """Difference of the exponents over the longest lengths that both have.

    Shorter calls are dispatch rather than work, and how long that goes on differs by backend.
    """
    lengths = sorted(length for length in first.keys() & second.keys() if length >= FIT_FROM)[-MIN_FIT:]
    if len(lengths) < MIN_FIT:
        return None
    slopes = [exponent(lengths, [curve[length] for length in lengths]) for curve in (first, second)]
    return abs(slopes[0] - slopes[1])


def outputs_agree(found: Agreement | None) -> bool:
    """Whether no backend was refused and no output differs too much."""
    if found is None:
        return True
    is_close = found.outputs is None or found.outputs_limit is None or found.outputs <= found.outputs_limit
    return is_close and not found.refused


def _compared(records: Sequence[Record]) -> str:
    return COMPARED.get(records[0]["direction"], "outputs") if records else "outputs"


def verdict(records: Sequence[Record], *, has_exponents: bool = True) -> str:
    """One line: do both backends agree in outputs and, where they are asked for, in exponents."""
    found = agreement(records, has_exponents=has_exponents)
    if found is None:
        present = sorted({record["backend"] for record in records})
        return f"backends not compared: {f'only {present[0]} ran' if present else 'nothing was measured'}"
    compared, rest = [], []
    is_close = found.exponents is None or found.exponents <= EXPONENT_LIMIT
    if found.outputs is not None:
        compared.append(f"{_compared(records)} within {found.outputs:.1e} (limit {found.outputs_limit:.0e})")
    if found.exponents is not None:
        where = "" if is_close else f", most apart in {found.worst}"
        compared.append(f"exponents within {found.exponents:.2f} (limit {EXPONENT_LIMIT:g}{where})")
    if found.refused:
        rest.append(f"refused: {', '.join(found.refused)}")
    if found.not_compared:
        rest.append(f"not compared: {'; '.join(found.not_compared)}")
    if not compared and not found.refused:
        return f"backends not compared: {', '.join(found.not_compared)}"
    word = "agree" if is_close and outputs_agree(found) else "DISAGREE"
    return f"backends {word}: {'; '.join(filter(None, [', '.join(compared), *rest]))}"
