"""`python -m bench accuracy`: error against exact attention, and time, on layers of pretrained models."""

import argparse
import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

from bench import accuracy_report, captures
from bench.arguments import OUT, chosen_backends, configured, natural, positive
from bench.inputs import Store
from bench.job import DTYPES, WINDOW_SINKS, Job
from bench.ledger import Ledger, refusals
from bench.pool import StartWorker
from bench.process import Child
from bench.progress import Progress
from bench.records import Record
from bench.registry import MECHANISMS, OWN_KERNEL
from bench.runner import OVERRUN_S
from bench.session import Options, Session, plan
from bench.sweep import Judge, JudgedPool, Layer, Task, Workers, tasks
from vq_common import TransformerConfig
from vq_common.config import DEVICES

HELP = "error against time, on captured layers"
DESCRIPTION = (
    "Error of every mechanism's output to exact attention, and its time, on q, k and v of layers of "
    "pretrained models that `python -m bench capture` kept. Codebooks are fitted on other text than is "
    "evaluated. Everything is verified before it is timed."
)
CODES = (128, 512)
WINDOWS = (128, 512)
QUICK_LAYER = "module/stdlib"
QUICK_LENGTH = 512
QUICK_ABOUT = f"{QUICK_LAYER}: projections of an untrained module, of text of Python's standard library"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this suite."""
    add = parser.add_argument
    add("--config", type=Path, default=Path("conf.yml"), metavar="FILE", help="default: conf.yml")
    add("--backend", choices=("jax", "torch", "both"), default="both", help="default: both, if installed")
    add("--mechanism", action="append", choices=tuple(MECHANISMS), help="repeatable; default: all")
    add("--captures", type=Path, metavar="DIR", help="default: where `python -m bench capture` writes")
    add("--layers", nargs="+", metavar="LAYER", help="as smollm2-135m/15, or whole models; default: all")
    add(
        "--lengths",
        type=positive,
        nargs="+",
        metavar="T",
        help="first tokens of a causal window; default: all",
    )
    add("--codes", type=positive, nargs="+", metavar="C", help=f"default: {_text(CODES)}")
    add(
        "--windows",
        type=natural,
        nargs="+",
        metavar="M",
        help=f"exact tokens before the block, of the window form; default: {_text(WINDOWS)}",
    )
    add("--n-sink", type=natural, default=WINDOW_SINKS, metavar="N", help=f"default: {WINDOW_SINKS}")
    add("--block-len", type=positive, metavar="L", help="block of causal VQ-attention")
    add("--dtype", choices=DTYPES, help="of q, k and v")
    add("--device", choices=DEVICES, help="a device that is named is required")
    add(
        "--quick",
        action="store_true",
        help=f"needs no capture: one small layer, {QUICK_LAYER}, the projections of an untrained module of "
        "text, at the first of the codes and windows; its errors say nothing of trained models",
    )
    add("--resume", action="store_true", help="go on with the records in --out")
    add("--out", type=Path, metavar="DIR", help="default: bench/results/local/accuracy")
    add("--max-run-s", type=float, metavar="S", help="seconds after which no further point is started")
    add("--max-point-s", type=float, metavar="S", help="seconds a call may be predicted to take")


def _text(values: tuple[int, ...]) -> str:
    return " ".join(map(str, values))


def run(arguments: argparse.Namespace, start_worker: StartWorker = Child) -> int:
    """Run the suite; the exit code: 0, 1 when something was refused, 130 after Ctrl-C.

    Raises:
      ValueError: nothing is captured, or an option is wrong.
      RunError: a backend has not the device, or the inputs cannot be made.
    """
    begin = time.monotonic()
    shared = dict.fromkeys(("n_head", "d_k", "d_v", "n_code", "mem_len"))
    config = configured(argparse.Namespace(**(vars(arguments) | shared | {"lengths": None})))
    layers = [_quick_layer(config)] if arguments.quick else _captured_layers(arguments)
    planned = _plan(arguments, Job.of(config, batch=1, is_random=False), layers)
    options = Options(
        job=planned[0].job,
        bench=config.bench,
        backends=chosen_backends(arguments.backend, config.device),
        mechanisms=(),
        causal=(),
        device=config.device,
        out=arguments.out or OUT / "accuracy",
        is_resume=arguments.resume,
        suite=arguments.suite,
    )
    return _run(options, planned, arguments.lengths, start_worker, begin)


def _captured_layers(arguments: argparse.Namespace) -> list[Layer]:
    found = captures.find(arguments.captures or captures.default_folder())
    layers = []
    for item in captures.choose(found, arguments.layers):
        arrays = captures.attended(captures.read(item))
        batch, length, heads, width = arrays["q"].shape

        def read(item: captures.Capture = item) -> captures.Arrays:
            return captures.attended(captures.read(item))

        shape = batch, heads, width, arrays["v"].shape[3]
        layers.append(Layer(item.layer, item.is_causal, length, shape, item.digest, read, item.about))
    return layers


def _quick_layer(config: TransformerConfig) -> Layer:
    shape = 1, 2, config.d_k, config.d_v
    return Layer(QUICK_LAYER, True, QUICK_LENGTH, shape, None, None, QUICK_ABOUT)


def _plan(arguments: argparse.Namespace, job: Job, layers: list[Layer]) -> list[Task]:
    """All jobs.

    Raises:
      ValueError: there would be nothing to measure, or a length that no layer has.
    """
    longest = max(layer.length for layer in layers)
    if arguments.lengths and max(arguments.lengths) > longest:
        raise ValueError(
            f"--lengths must be at most {longest:,}, as is captured, found {max(arguments.lengths):,}"
        )
    mechanisms = tuple(name for name in MECHANISMS if name in (arguments.mechanism or OWN_KERNEL))
    codes, windows = (
        tuple(dict.fromkeys(given or (usual[:1] if arguments.quick else usual)))
        for given, usual in ((arguments.codes, CODES), (arguments.windows, WINDOWS))
    )
    base = dataclasses.replace(job, n_sink=arguments.n_sink)
    planned = [task for layer in layers for task in tasks(layer, base, mechanisms, codes, windows)]
    if not planned:
        raise ValueError(f"{', '.join(mechanisms)} need causal attention, found layers without")
    return planned


def _run(
    options: Options, planned: list[Task], lengths: list[int] | None, start_worker: StartWorker, begin: float
) -> int:
    out = options.out
    folder = out / "inputs"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    workers = Workers(start_worker)
    found: list[Record] = []
    notes: list[str] = []
    known: dict[str, Any] = {}
    is_interrupted = False
    runs = [(task, _options(options, task, lengths)) for task in planned]
    with Progress() as progress:
        progress.begin(sum(len(plan(of_task)) for _, of_task in runs))
        try:
            for number, (task, of_task) in enumerate(runs):
                is_resume = options.is_resume or number > 0
                ledger = Ledger(out / "records.jsonl", options.suite, task.job, is_resume=is_resume)
                is_interrupted = _run_task(of_task, task, ledger, progress, workers, known, notes, begin)
                found += ledger.current()
                if is_interrupted:
                    break
        finally:
            workers.close()
            shutil.rmtree(folder, ignore_errors=True)
        about = list(dict.fromkeys(task.layer.about for task in planned))
        for line in accuracy_report.write(out, found, about, notes):
            progress.line(line)
    if is_interrupted:
        return 130
    return 1 if refusals(found) else 0


def _options(options: Options, task: Task, lengths: list[int] | None) -> Options:
    """The options of one job."""
    layer = task.layer
    asked = sorted({min(length, layer.length) for length in lengths or ()}) if layer.is_causal else []
    bench = dataclasses.replace(options.bench, lengths=tuple(asked or [layer.length]))
    return options._replace(job=task.job, bench=bench, mechanisms=task.mechanisms, causal=(layer.is_causal,))


def _run_task(
    options: Options,
    task: Task,
    ledger: Ledger,
    progress: Progress,
    workers: Workers,
    known: dict[str, Any],
    notes: list[str],
    begin: float,
) -> bool:
    """Verify and measure one job; whether it was interrupted."""
    layer, folder = task.layer, options.out / "inputs"
    # Where codebooks are fitted on the module's own text, that is as long again.
    stored = layer.length if layer.read else 2 * layer.length
    for path in folder.glob("*.npy"):
        path.unlink()
    store = Store(folder, task.job, stored)
    if layer.read is not None:
        for name, x in layer.read().items():
            store.write(f"captured_{name}", x)
    setup = {"device": options.device, "folder": str(folder), "length": stored, "job": task.job.to_json()}
    setups = {backend: setup | {"backend": backend} for backend in options.backends}
    judge = Judge(store, layer.is_causal, known)
    pool = JudgedPool(setups, workers, begin + options.bench.max_run_s + OVERRUN_S, judge)
    for note in ledger.notes:
        progress.line(note)
    progress.line(task.title)
    current = Session(options, pool, ledger, progress, store, begin)
    try:
        return current.run()
    finally:
        notes += [note for note in current.notes if note not in notes]
