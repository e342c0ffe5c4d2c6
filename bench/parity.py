"""Whether two backends are one thing: outputs and gradients, operations and memory, without a clock."""

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import fit, host, registry, verify
from bench.inputs import Store
from bench.job import Point, is_exact
from bench.ledger import Ledger
from bench.pool import Pool, StartWorker
from bench.process import Child
from bench.progress import Progress
from bench.session import Options, Session

SLOPE = 0.05  # how far a fitted exponent of operations may be from what it should be, or from its twin's
HYPER_CAUSAL = 1.25  # T log T, fitted over a short range

Form = tuple[str, bool]  # mechanism, is_causal


class Side(NamedTuple):
    """One backend's part of a row; None where something was not found."""

    out_error: float | None  # to the oracle
    gradient_error: float | None
    flops_exponent: float | None
    memory_exponent: float | None
    flops: int | None  # of the longest call
    n_bytes: int | None


class Row(NamedTuple):
    """One mechanism in one form."""

    mechanism: str
    is_causal: bool
    sides: dict[str, Side]  # by backend
    twin_error: float | None
    troubles: tuple[str, ...]  # why the form does not pass
    not_run: dict[str, str]  # backend to why it cannot run this


def compare(
    options: Options,
    lengths: Sequence[int],
    progress: Progress,
    start_worker: StartWorker = Child,
    *,
    is_fast: bool = False,
) -> list[Row]:
    """Verify every form of `options` in its backends, then count at `lengths`.

    Args:
      is_fast: have XLA optimize nothing, which compiles several times faster.

    Raises:
      RunError: a backend has not the device, or the inputs cannot be made.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = options._replace(out=Path(folder))
        store = Store(folder, options.job, max(options.bench.lengths))
        setup = {"device": options.device, "folder": folder, "length": store.length}
        setup |= {"job": options.job.to_json(), "environment": {}}
        if is_fast:
            flags = [*filter(None, [os.environ.get("XLA_FLAGS")]), host.fast_compile_flags()]
            setup["environment"] = {"XLA_FLAGS": " ".join(flags)}
        setups = {backend: setup | {"backend": backend} for backend in options.backends}
        begin = time.monotonic()
        ledger = Ledger(
            Path(folder) / "records.jsonl",
            options.suite,
            options.job,
            direction=options.direction,
            is_resume=False,
        )
        pool = Pool(setups, start_worker, begin + options.bench.max_run_s)
        try:
            session = Session(options, pool, ledger, progress, store, begin)
            session.start()
            session.verify()
            forms = [(mechanism, form) for mechanism in options.mechanisms for form in options.causal]
            rows = []
            for form in forms:
                progress.now(f"counting {fit.curve_name(*form)}")
                rows.append(_row(form, options, session, lengths))
                progress.point(None)
            return [row for row in rows if row.sides]
        finally:
            pool.close()


def _row(form: Form, options: Options, session: Session, lengths: Sequence[int]) -> Row:
    point = Point(*form, min(options.bench.lengths), options.direction)
    reasons = {
        b: registry.unsupported(b, options.job, point) or session.unavailable.get((b, *form))
        for b in options.backends
        if registry.has_kernel(b, form[0])
    }
    backends = [backend for backend, reason in reasons.items() if not reason]
    message = {"do": "count", "mechanism": form[0], "is_causal": form[1], "lengths": list(lengths)}
    counts = session.pool.ask_all(backends, message) if backends else {}
    troubles, sides, twin_errors = [], {}, []
    for backend in backends:
        key = backend, *form
        found = session.verified.get(key, {})
        if key in session.refused:
            troubles.append(f"{backend} {session.refused[key]}")
        count = counts[backend]
        if count["status"] != "ok":
            troubles.append(f"{backend} could not be counted: {count['reason']}")
        sides[backend] = _side(found, count, lengths)
        twin_errors += [found["twin_error"]] if found.get("twin_error") is not None else []
    limit = verify.twin_limit(options.job.dtype, options.direction)
    twin_error = max(twin_errors, default=None)
    if twin_error is not None and twin_error > limit:
        troubles.append(f"backends differ by {twin_error:.1e}, limit {limit:.0e}")
    troubles += exponent_troubles(form, sides)
    not_run = {backend: reason for backend, reason in reasons.items() if reason}
    return Row(*form, sides, twin_error, tuple(troubles), not_run)


def _side(found: Mapping[str, Any], count: Mapping[str, Any], lengths: Sequence[int]) -> Side:
    errors = found.get("oracle_error"), found.get("gradient_error")
    if count["status"] != "ok":
        return Side(*errors, None, None, None, None)
    flops, n_bytes = count["flops"], count["n_bytes"]
    slopes = fit.exponent(lengths, flops), fit.exponent(lengths, n_bytes)
    return Side(*errors, *slopes, flops[-1], n_bytes[-1])


def exponent_range(form: Form) -> tuple[float, float]:
    """What the exponent of a form's operations may be."""
    mechanism, is_causal = form
    if is_exact(mechanism):
        return 2 - SLOPE, 2 + SLOPE
    return 1 - SLOPE, HYPER_CAUSAL if mechanism == "hyper" and is_causal else 1 + SLOPE


def exponent_troubles(form: Form, sides: Mapping[str, Side]) -> list[str]:
    """What is wrong with fitted exponents; memory of exact attention depends on the kernel alone."""
    low, high = exponent_range(form)
    troubles = []
    for backend, side in sides.items():
        slope, memory = side.flops_exponent, side.memory_exponent
        if slope is not None and not low <= slope <= high:
            troubles.append(
                f"{backend} operations grow as T^{slope:.2f}, not within {low:.2f} ... {high:.2f}"
            )
        if not is_exact(form[0]) and memory is not None and memory > high:
            troubles.append(f"{backend} memory grows as T^{memory:.2f}, limit {high:.2f}")
    slopes = [side.flops_exponent for side in sides.values() if side.flops_exponent is not None]
    if len(slopes) == 2 and abs(slopes[0] - slopes[1]) > SLOPE:
        troubles.append(
            f"operations grow as T^{slopes[0]:.2f} and T^{slopes[1]:.2f}, more than {SLOPE} apart"
        )
    return troubles
