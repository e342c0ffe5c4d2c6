"""A run of a suite, from its options to its report and exit code."""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import fit, report
from bench.inputs import Store
from bench.ledger import Ledger, refusals
from bench.pool import Pool, StartWorker
from bench.process import Child
from bench.progress import Progress
from bench.records import Record
from bench.session import Options, Session, plan

OVERRUN_S = 15.0  # past max_run_s, after which a point in flight is ended

# Writes a report into a folder, of its records and notes; the lines to print, the last one a verdict.
Present = Callable[[Path, Sequence[Record], Sequence[str]], list[str]]


def run(options: Options, start_worker: StartWorker = Child) -> int:
    """Run a suite of one job; as `run_all`."""

    def present(out: Path, found: Sequence[Record], notes: Sequence[str]) -> list[str]:
        return [*report.write(out, found, notes, options.suite), fit.verdict(found)]

    return run_all([options], present, start_worker)


def run_all(runs: Sequence[Options], present: Present, start_worker: StartWorker = Child) -> int:
    """Run the jobs or directions of a suite one after the other, into one file of records.

    Args:
      runs: alike in all but `job`, `mechanisms` and `direction`.

    Returns:
      The exit code: 0, 1 when something was refused, 130 after Ctrl-C.

    Raises:
      RunError: a backend has not the device, or the inputs cannot be made.
    """
    begin = time.monotonic()
    out = runs[0].out
    out.mkdir(parents=True, exist_ok=True)
    ledgers = [_ledger(options, is_resume=options.is_resume or i > 0) for i, options in enumerate(runs)]
    notes: list[str] = []
    is_interrupted = False
    with Progress() as progress:
        progress.begin(sum(len(plan(options)) for options in runs))
        for note in ledgers[0].notes:
            progress.line(note)
        for options, ledger in zip(runs, ledgers, strict=True):
            ledger.devices |= ledgers[0].devices
            if is_interrupted:
                continue
            if _is_done(options, ledger):
                for _ in plan(options):
                    progress.point(None)
                continue
            is_interrupted = _run_one(options, ledger, progress, start_worker, begin, notes)
    for ledger in ledgers:
        ledger.join_exact()
    found = [ledger.current() for ledger in ledgers]
    every = [record for part in found for record in part]
    for line in present(out, every, list(dict.fromkeys(notes))):
        print(line, flush=True)
    if is_interrupted:
        return 130
    return 1 if any(refusals(x) or not fit.outputs_agree(fit.agreement(x)) for x in found) else 0


def _ledger(options: Options, *, is_resume: bool) -> Ledger:
    path = options.out / "records.jsonl"
    return Ledger(path, options.suite, options.job, direction=options.direction, is_resume=is_resume)


def _is_done(options: Options, ledger: Ledger) -> bool:
    """Whether nothing is left to measure; False as long as the devices are not known."""
    if not ledger.devices:
        return False
    done = ledger.done()
    return all(ledger.identity(*item) in done for item in plan(options))


def _run_one(
    options: Options,
    ledger: Ledger,
    progress: Progress,
    start_worker: StartWorker,
    begin: float,
    notes: list[str],
) -> bool:
    """Verify and measure; whether Ctrl-C ended it."""
    folder = options.out / "inputs"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    store = Store(folder, options.job, max(options.bench.lengths))
    setup = {
        "device": options.device,
        "folder": str(folder),
        "length": store.length,
        "job": options.job.to_json(),
        "extras": list(options.extras),
        "held_out": options.held_out,
    }
    setups = {backend: setup | {"backend": backend} for backend in options.backends}
    pool = Pool(setups, start_worker, begin + options.bench.max_run_s + OVERRUN_S)
    if options.title:
        progress.line(f"--- {options.title}")
    session = Session(options, pool, ledger, progress, store, begin)
    try:
        return session.run()
    finally:
        notes += session.notes
        pool.close()
        shutil.rmtree(folder, ignore_errors=True)
