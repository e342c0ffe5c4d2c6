"""Sizes of the GPU kernels' tiles: candidates, and the calls that they are timed in. Needs jax."""

import itertools
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bench import host, measure
from bench.job import WINDOW_SINKS, Job
from bench.on_jax import Backend
from jax_vq.kernels import quantize, sizes, vq_causal, vq_causal_grad, vq_full, vq_sums, vq_tables
from jax_vq.kernels.sizes import Row, Size
from jax_vq.kernels.tiles import power_of_two
from jax_vq.ops import implementations
from jax_vq.ops.vq_blocks import Form, Keys
from jax_vq.ops.vq_causal import Books, Queries
from jax_vq.ops.vq_state import empty_state, find_documents
from vq_common import TransformerConfig
from vq_common.tolerances import TOLERANCES

# Codes are a choice: two that are as near as rounding tells may change places.
MAX_CHANGED = 1e-4
NOISE = 1.02  # between times of one program
CODES = "codes", "settle", "every_code"  # the kernels that find them
BRIEF_LEN = 2048  # tokens of a call that takes in all bits of up to 512 codes at once
CHUNKS = {
    "settle": (64, 128),
    "states": (64, 128),
    "blocks": (64, 128),
    "window": (64, 128),
    "grad_states": (64, 128),
    "grad_blocks": (32, 64),
}  # of codes, where 128 are not the only choice
WINDOW = 512  # exact tokens before a block, and of a block


class Shape(NamedTuple):
    """Of the arrays that sizes are chosen for."""

    length: int
    n_head: int
    width: int


class Call(NamedTuple):
    """A step that a kernel is the most of, for one number of codes."""

    kernel: str
    n_code: int
    run: Callable[..., Any]
    arrays: tuple[Any, ...]


class Tried(NamedTuple):
    """A size: its milliseconds, or why it has none."""

    size: Size
    ms: float | None
    reason: str | None = None


def candidates(kernel: str, n_code: int, width: int) -> list[Size]:
    """Sizes worth trying, and the one in use; those that do not fit a processor fail to compile."""
    wide = min(max(width, 16), 128)
    half = max(wide // 2, 16)
    choices = {
        "codes": ((64, 128, 256), (wide,), (4, 8), (2, 3, 4)),
        "settle": ((32, 64, 128), (wide,), (4, 8), (1, 2, 3)),
        "every_code": ((32, 64, 128), (wide,), (4, 8), (1, 2)),
        "sums": ((128,), tuple({half, wide}), (4, 8), (2, 3, 4)),  # segments are whole blocks elsewhere
        "sums_float32": ((64, 128), tuple({half, wide}), (4, 8), (1, 2, 3)),
        "answer": ((32, 64, 128), (wide,), (4, 8), (1,)),
        "causal": ((64, 128), tuple({half, wide}), (4, 8), (1, 2, 3)),
        "causal_float32": ((64, 128), tuple({half, wide}), (4, 8), (1, 2)),
        "states": ((64, 128), tuple({half, wide}), (4, 8), (2, 3, 4)),
        "blocks": ((64, 128), (wide,), (4, 8), (1, 2, 3)),
        "window": ((64, 128), (wide,), (4, 8), (1, 2, 3)),
        "grad_states": ((64, 128), tuple({half, wide}), (4, 8), (2, 3, 4)),
        "grad_blocks": ((128,), (wide,), (4, 8), (1, 2, 3)),  # of 64 twice as much is kept between kernels
    }
    tiles, columns, warps, stages = choices[kernel]
    chunks = {min(n_code, chunk) for chunk in CHUNKS.get(kernel, (128,))}
    found = [Size(*size) for size in itertools.product(tiles, sorted(chunks), columns, warps, stages)]
    used = sizes.size_of(kernel, n_code)
    used = used._replace(chunk=min(used.chunk, n_code), columns=min(used.columns, wide))
    return found if used in found else [*found, used]


def timer() -> Backend:
    """The benchmark's own side of jax, whose clock times all that it measures."""
    return Backend("auto", Job.of(TransformerConfig(dtype="bfloat16"), batch=1, is_random=True))


def calls(shape: Shape, n_code: int) -> Iterator[Call]:
    """One call of every kernel that is for so many codes, on Gaussian vectors."""
    length, n_head, width = shape
    key = jax.random.key(0)

    def draw(i: int, *size: int) -> Any:
        return jax.random.normal(jax.random.fold_in(key, i), size, jnp.float32)

    q, k, v, d_out = (draw(i, 1, length, n_head, width).astype(jnp.bfloat16) for i in range(4))
    book_q, book_k = (draw(i, n_head, n_code, width) for i in (4, 5))
    codes_q, codes_k = quantize.finite_codes((q, k), (book_q, book_k))
    keys, queries = Keys(codes_k, v, None, None), Queries(None, codes_q, None)
    books = Books.of(book_q, book_k, None, width**-0.5)
    state, form = empty_state(1, (n_head, n_code), (width, width), v.dtype, 0, 0), Form(width**-0.5)
    seen = vq_full.count_keys(keys, books)
    each = sizes.segment_len(length, n_head, 128)
    for kernel in ("codes", "settle"):
        yield Call(kernel, n_code, quantize.finite_codes, ((q,), (book_q,)))
    for kernel, values in (("sums", v), ("sums_float32", v.astype(jnp.float32))):
        yield Call(kernel, n_code, lambda c, v: vq_sums.segment_sums(c, v, n_code, each), (codes_k, values))
    scaled = partial(_scaled, books.scale)
    books = books._replace(scale=None)
    yield Call("answer", n_code, scaled(vq_full.full_attention), (queries, keys, books, seen))
    if n_code > sizes.MAX_CODES:
        return
    brief = (q[:, :BRIEF_LEN], k[:, :BRIEF_LEN]), (book_q, book_k)
    yield Call("every_code", n_code, quantize.finite_codes, brief)
    causal = scaled(partial(_causal, form))
    n_padded, chunk = vq_sums.padded_codes(n_code)
    for kernel in ("states", "blocks") if n_padded > chunk else ("causal",):
        yield Call(kernel, n_code, causal, (queries, keys, books, state))
    if n_code <= sizes.MAX_CODES_FLOAT32:
        wide = keys._replace(v=v.astype(jnp.float32))
        yield Call("causal_float32", n_code, causal, (queries, wide, books, state))
    yield _windowed(q, k, v, codes_q, codes_k, books, scaled)
    out, lse = causal(queries, keys, books, state)
    arrays = queries, keys, books, state, out, lse, d_out
    for kernel in ("grad_states", "grad_blocks"):
        yield Call(kernel, n_code, scaled(_gradients), arrays)


def _scaled(scale: float, run: Callable[..., Any]) -> Callable[..., Any]:
    """A step of (queries, keys, books, ...) with a scale in place of that of the books.

    It is a number that programs are made for, and would be an array among the arguments of a call.
    """
    return lambda queries, keys, books, *rest: run(queries, keys, books._replace(scale=scale), *rest)


def _windowed(
    q: jax.Array, k: jax.Array, v: jax.Array, codes_q: Any, codes_k: Any, books: Books, scaled: Any
) -> Call:
    """Attention with an exact window of four tiles, or of one block in a short sequence."""
    window = min(WINDOW, power_of_two(q.shape[1]) // 2)
    lengths = {"block_len": window, "mem_len": window, "part_len": window, "overhang": window}
    form = Form(k.shape[3] ** -0.5, n_sink=WINDOW_SINKS, is_whole=True, **lengths)
    widths = k.shape[3], v.shape[3]
    state = empty_state(1, books.k.shape[:2], widths, v.dtype, window, WINDOW_SINKS)
    keys = Keys(codes_k, v, k, find_documents(q, None, None, None))
    arrays = Queries(None, codes_q, q), keys, books, state
    return Call("window", books.k.shape[1], scaled(partial(_causal, form)), arrays)


def _causal(form: Form, queries: Queries, keys: Keys, books: Books, state: Any) -> Any:
    return vq_causal.causal_attention(queries, keys, books, state, form)[:2]


def _gradients(queries: Queries, keys: Keys, books: Books, state: Any, out: Any, lse: Any, d_out: Any) -> Any:
    tables = vq_tables.Tables.of(books, vq_sums.padded_codes(books.k.shape[1])[0], keys.v.dtype)
    arrays = queries, keys, books, state, tables, out, lse, d_out, jnp.zeros_like(lse)
    found = vq_causal_grad.narrow_gradients(*arrays)
    return found.q, found.k, found.v


def expected(call: Call) -> Any:
    """What a call gives with the size that is in use."""
    return jax.jit(call.run)(*call.arrays)


def attempts(call: Call, tried: list[Size], target: Any, backend: Backend) -> Iterator[Tried]:
    """Every size, compiled side by side, then verified and timed one after the other by the backend."""
    lowered = [_lowered(call, size) for size in tried]
    with ThreadPoolExecutor() as pool:
        programs = [pool.submit(_compiled, one) for one in lowered]
        for size, program in zip(tried, programs, strict=True):
            yield _attempt(call, size, program.result(), target, backend)


def _lowered(call: Call, size: Size) -> Any:
    """A call for a size by Triton's kernels, which alone have sizes to choose; or why it has none."""
    try:
        with implementations.asking("triton"), sizes.trying(call.kernel, size):
            return jax.jit(lambda *arrays: call.run(*arrays)).lower(*call.arrays)
    except (ValueError, NotImplementedError) as error:
        return measure.first_line(str(error))


def _compiled(lowered: Any) -> Any:
    """A program, or why there is none: a kernel can ask for more memory than a processor has."""
    if isinstance(lowered, str):
        return lowered
    try:
        return lowered.compile()
    except RuntimeError as error:
        return measure.first_line(str(error))


def difference(call: Call, found: Any, expected: Any) -> str | None:
    """What is wrong with the results of another size, or None."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if call.kernel in CODES:
            changed = float(jnp.mean(one != other))
            if changed > MAX_CHANGED:
                return f"{changed:.1%} of the codes change"
            continue
        limit = max(TOLERANCES["float32" if call.kernel.endswith("_float32") else "bfloat16"])
        error = float(_relative_rms(one, other))
        if not error <= limit:
            return f"relative RMS difference {error:.1e}, limit {limit:.0e}"
    return None


@jax.jit
def _relative_rms(one: jax.Array, other: jax.Array) -> jax.Array:
    """`vq_common.tolerances.relative_rms`, where the arrays are."""
    one, other = one.astype(jnp.float32), other.astype(jnp.float32)
    size = jnp.sqrt(jnp.mean(other**2))
    error = jnp.sqrt(jnp.mean((one - other) ** 2))
    return jnp.where(error == 0, 0.0, error / size)


def _attempt(call: Call, size: Size, program: Any, target: Any, backend: Backend) -> Tried:
    if isinstance(program, str):
        return Tried(size, None, program)
    wrong = difference(call, program(*call.arrays), target)
    if wrong:
        return Tried(size, None, wrong)
    times = backend.times(measure.Program(program), call.arrays).times_ms
    return Tried(size, measure.spread(times).ms_median)


def chosen(call: Call, timed: list[Tried]) -> Tried:
    """The fastest of sizes in the order of their times, or the one in use where that takes as long."""
    used = sizes.size_of(call.kernel, call.n_code)
    limit = NOISE * (timed[0].ms or 0)
    same = (one for one in timed if one.size == used and one.ms is not None and one.ms <= limit)
    return next(same, timed[0])


def write(path: Path, rows: list[tuple[Row, float]], shape: Shape, kept: list[Row]) -> None:
    """A table of the rows that were found, with their milliseconds, and of those kept as they were."""
    made = {
        "device": jax.devices()[0].device_kind,
        "commit": host.commit(),
        "versions": host.versions(),
        "shape": shape._asdict(),
    }
    lines = [
        {
            "kernel": row.kernel,
            "n_code": row.n_code,
            **row.size._asdict(),
            **({} if ms is None else {"ms": ms}),
        }
        for row, ms in (*rows, *((row, None) for row in kept))
    ]
    lines.sort(key=lambda line: (line["kernel"], line["n_code"]))
    text = ",\n    ".join(json.dumps(line) for line in lines)
    path.write_text(
        f'{{\n  "made": {json.dumps(made)},\n  "rows": [\n    {text}\n  ]\n}}\n', encoding="utf-8"
    )
