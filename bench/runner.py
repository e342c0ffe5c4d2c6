"""A run of a suite, from its options to its report and exit code."""

import shutil
import time

from bench import fit, report
from bench.inputs import Store
from bench.ledger import Ledger, refusals
from bench.pool import Pool, StartWorker
from bench.process import Child
from bench.progress import Progress
from bench.session import Options, Session

OVERRUN_S = 15.0  # past max_run_s, after which a point in flight is ended


def run(options: Options, start_worker: StartWorker = Child) -> int:
    """Run the suite; the exit code: 0, 1 when something was refused, 130 after Ctrl-C.

    Raises:
      RunError: a backend has not the device, or the inputs cannot be made.
    """
    begin = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    folder = options.out / "inputs"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    store = Store(folder, options.job, max(options.bench.lengths))
    setup = {
        "device": options.device,
        "folder": str(folder),
        "length": store.length,
        "job": options.job.to_json(),
    }
    setups = {backend: setup | {"backend": backend} for backend in options.backends}
    ledger = Ledger(
        options.out / "records.jsonl",
        options.suite,
        options.job,
        direction=options.direction,
        is_resume=options.is_resume,
    )
    pool = Pool(setups, start_worker, begin + options.bench.max_run_s + OVERRUN_S)
    is_interrupted = False
    try:
        with Progress() as progress:
            for note in ledger.notes:
                progress.line(note)
            session = Session(options, pool, ledger, progress, store, begin)
            try:
                session.start()
                session.verify()
                session.measure()
            except KeyboardInterrupt:
                is_interrupted = True
                progress.line("interrupted: what was measured is kept, --resume goes on")
    finally:
        pool.close()
        shutil.rmtree(folder, ignore_errors=True)
    ledger.join_exact()
    found = ledger.current()
    for line in report.write(options.out, found, session.notes, options.suite):
        print(line)
    print(fit.verdict(found), flush=True)
    if is_interrupted:
        return 130
    return 1 if refusals(found) or not fit.outputs_agree(fit.agreement(found)) else 0
