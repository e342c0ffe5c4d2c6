"""Results: one flat JSON object a line, appended the moment it is known.

`KEYS` is the format. A line that is torn, because the run was killed while it wrote, is dropped.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Record = dict[str, Any]

KEYS = {
    "suite": "name of the suite: 'scaling', 'decode', 'codebook', 'memory' or 'accuracy'",
    "backend": "'jax' or 'torch'",
    "mechanism": "'vq_qk', 'vq_k', 'vq_qk_window', 'vq_k_window', 'exact_window', 'hyper', 'exact', or "
    "'exact_flash' and the like, which name the kernel",
    "implementation": "kernel that ran: 'xla', 'cudnn', 'eager', 'flash', ...; null where none did",
    "device": "'cpu', 'cuda' or 'mps'",
    "device_name": "model of the device",
    "dtype": "of q, k, v and the output",
    "is_causal": "whether a token attends only to itself and earlier ones",
    "direction": "what is timed: 'fwd' (a forward call), 'bwd' (the pullback of a cotangent alone, on what "
    "the forward call saved), 'fwd+bwd' (both in one call) or, in the suite 'decode', 'step' (the last of T "
    "tokens alone, forward, after the others)",
    "batch": "B",
    "heads": "H",
    "length": "T, tokens; of a step: those that it sees, its own included",
    "width": "D, of a query or key of one head",
    "value_width": "V, of a value of one head",
    "codes_q": "codes of the query codebook",
    "codes_k": "codes of the key codebook",
    "block_len": "L of causal VQ-attention",
    "mem_len": "exact tokens before the block, of this mechanism: 0 for all but the window form",
    "n_sink": "exact first tokens, of this mechanism: 0 for all but the window form",
    "input": "'real' (q, k, v of a module over bytes of Python's standard library), 'random' (Gaussian) "
    "or 'captured' (of a layer of a pretrained model)",
    "status": "'ok', 'skipped' (not tried: see reason) or 'failed' (tried: see reason)",
    "reason": "why the point is not ok, else null",
    "timing": "'host clock' (of single calls), 'host clock, enqueued calls' (many calls enqueued, waited for "
    "once, divided), 'device events' or 'device profiler' (both on the device's own clock; from the first "
    "kernel of a call to its last); null where nothing was timed",
    "ms_median": "median milliseconds of one call, quantization included",
    "ms_p20": "20th percentile",
    "ms_p80": "80th percentile",
    "n_repeat": "timed calls, or batches of enqueued calls",
    "compile_s": "seconds to compile, before the first call; of a step, to compile what takes in the tokens "
    "before it too; null where nothing is compiled",
    "quantize_ms": "milliseconds to find the codes alone, a part of ms_median; null without codes, "
    "and where that is not timed apart or not part of the call ('bwd', 'step')",
    "peak_bytes": "most bytes in use at once, inputs and output included: as reserved by the compiler (jax), "
    "as seen by the allocator (torch on cuda), as the sum of live storages (torch elsewhere); with 'bwd' "
    "the forward call before it counts",
    "state_bytes": "of a step: bytes kept between tokens, in a state or a key and value cache; else null",
    "feed_s": "of a step: seconds to take in the tokens before it, without compilation; else null",
    "temp_bytes": "those that the compiler reserves beside inputs and output; null where nothing is compiled",
    "observed_bytes": "most bytes seen in use while calls ran, of the allocator (cuda) or of the process "
    "beyond what it had before (cpu); null where that is not asked for",
    "dispatch_ms": "milliseconds of the host to enqueue one call without waiting for it; null on a cpu",
    "floor_ms": "no kernel is faster: the longer of definition_bytes over copy_gb_s and definition_flops "
    "over matmul_tflop_s",
    "definition_bytes": "bytes that the definition moves: every input read once, every output written once",
    "definition_flops": "operations of the matrix products that the definition needs",
    "copy_gb_s": "10^9 bytes a second, read and written, of a large copy on this device in the same run",
    "matmul_tflop_s": "10^12 operations a second of a large matrix product of this dtype, in the same run",
    "exact_ms": "ms_median of exact attention by the framework's best kernel: the same backend, form, length "
    "and direction in the same run; null where that was not measured",
    "quantize_error_q": "relative RMS error of quantized q; null where it is not quantized or not asked for",
    "quantize_error_k": "the same of k",
    "exact_error": "relative RMS error of the output to exact attention in float64 on the same q, k, v; null "
    "where that is not asked for",
    "layer": "where q, k and v are captured, as 'smollm2-135m/12'; null where they are made from `input`",
    "oracle_error": "relative RMS error to the float64 oracle, of the output, found before timing on the "
    "first tokens; null where no output is timed ('bwd')",
    "gradient_error": "the same of the gradients of q, k and v, the largest of the three; null without them",
    "twin_error": "relative RMS difference to the other backend on those tokens, the largest of output and "
    "gradients; null without one",
    "verified_length": "those tokens",
    "row_error": "relative RMS error of a few rows of the output to float64, at the length that is timed; "
    "null where no output is timed, of HyperAttention, and where that takes long (see bench.rows)",
    "config_hash": "changes with any setting that can change the figures, see bench.job.Job",
    "commit": "of this project; '+dirty' with local changes; VQ_COMMIT of the environment goes first",
    "versions": "'name=version' of Python and the packages",
    "time": "when it was recorded, UTC",
}

IDENTITY = (
    "suite",
    "backend",
    "device",
    "device_name",
    "mechanism",
    "is_causal",
    "direction",
    "length",
    "config_hash",
    "layer",
)


def identity(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes two records measurements of the same thing."""
    return tuple(record.get(key) for key in IDENTITY)


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add one record: a single write, on disk when this returns.

    Raises:
      ValueError: the keys are not `KEYS`.
    """
    if record.keys() != KEYS.keys():
        raise ValueError(f"record keys differ from KEYS: {sorted(record.keys() ^ KEYS.keys())}")
    line = json.dumps({key: record[key] for key in KEYS}) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rewrite(path: Path, found: Iterable[Mapping[str, Any]]) -> None:
    """Put these records in place of those of a file, all of them or, when killed before the end, none."""
    new = path.with_suffix(".new")
    with open(new, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(dict(record)) + "\n" for record in found)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def read(path: Path) -> list[Record]:
    """All records of a file, oldest first; a torn last line is left out.

    Raises:
      ValueError: another line is no record.
    """
    return _parse(path, path.read_bytes())[0] if path.exists() else []


def repair(path: Path) -> bool:
    """Cut a torn last line off, so that appending goes on; whether there was one."""
    data = path.read_bytes() if path.exists() else b""
    _, n_good = _parse(path, data)
    if n_good == len(data):
        return False
    os.truncate(path, n_good)
    return True


def _parse(path: Path, data: bytes) -> tuple[list[Record], int]:
    """The records and how many bytes hold them."""
    records, n_good = [], 0
    lines = data.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        is_last = number == len(lines)
        try:
            record = json.loads(line)
            is_whole = line.endswith(b"\n") and isinstance(record, dict)
        except ValueError:
            is_whole = False
        if not is_whole and is_last:
            break
        if not is_whole:
            raise ValueError(f"{path}, line {number}: not a record: {line[:80]!r}")
        records.append(record)
        n_good += len(line)
    return records, n_good


def latest(records: Iterable[Record]) -> list[Record]:
    """The last record of every identity, in the order of first appearance."""
    return list({identity(record): record for record in records}.values())
