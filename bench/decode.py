"""One token after another: what every mechanism keeps between tokens, and the call that takes one in."""

import importlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from bench import registry
from bench.job import Job
from bench.measure import Program

FEED_LEN = 1024  # tokens taken in at once; jax compiles for this number and for that of the rest


class Stream(NamedTuple):
    """A mechanism of one backend that takes tokens q, k, v `[B, N, H, .]` in."""

    start: Callable[[], Any]  # what is kept before the first token
    feed: Callable[..., Any]  # (kept, q, k, v, *codebooks) -> kept
    step: Callable[..., Any]  # (kept, q, k, v, *codebooks) -> (out, kept), of one token
    implementation: str


class Ready(NamedTuple):
    """The last token of a context, ready to be timed again and again."""

    program: Program  # of `arrays`; keeps for itself what a call leaves to the next one
    arrays: tuple[Any, ...]
    implementation: str
    state_bytes: int
    feed_s: float  # without compilation, which is in the program's compile_s


class Decoder:
    """Brings mechanisms of one backend to the end of a context.

    VQ-attention is compiled once for all contexts. Exact attention is compiled for each: its cache
    holds T tokens, its kernel sees all of them, and a step that is repeated overwrites the last.

    Args:
      backend: an `on_jax.Backend` or `on_torch.Backend`.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._feeders: dict[tuple[str, Job], Callable[..., Any]] = {}
        self._programs: dict[tuple[str, Job], Program] = {}

    def at(
        self,
        mechanism: str,
        job: Job,
        length: int,
        read: Callable[[str, int, int], Any],
        codebooks: tuple[Any, ...],
    ) -> Ready:
        """Feed `length - 1` tokens in pieces; the step is the last one.

        Args:
          read: `(name, start, stop)` to tokens of q, k or v on the device.
          codebooks: those of the mechanism, on the device.
        """
        last = tuple(read(name, length - 1, length) for name in ("q", "k", "v"))
        stream = build(mechanism, self._backend, job, length, (*last, *codebooks))
        key, is_exact = (mechanism, job), mechanism == "exact"
        if is_exact or key not in self._feeders:
            self._feeders[key] = self._backend.feeder(stream.feed)

        def feed(kept: Any, start: int) -> Any:
            stop = min(start + FEED_LEN, length - 1)
            piece = (read(name, start, stop) for name in ("q", "k", "v"))
            return self._feeders[key](kept, *piece, *codebooks)

        begin = time.perf_counter()
        starts = range(0, length - 1, FEED_LEN)
        for start in {*starts[:1], *starts[-1:]}:  # one of each number of tokens
            self._backend.device.synchronize(feed(stream.start(), start))
        compiled = time.perf_counter()
        kept = stream.start()
        for start in starts:
            kept = feed(kept, start)
        self._backend.device.synchronize(kept)
        feed_s = time.perf_counter() - compiled
        arrays = *last, *codebooks
        if is_exact or key not in self._programs:
            self._programs[key] = self._backend.compile_step(stream.step, kept, arrays)
        program = self._programs[key]
        if program.compile_s is not None:
            program = program._replace(compile_s=program.compile_s + compiled - begin)
        state_bytes = self._backend.n_bytes(kept)
        ready = program._replace(run=_keeping(program.run, kept))
        return Ready(ready, arrays, stream.implementation, state_bytes, feed_s)


def _keeping(run: Callable[..., Any], kept: Any) -> Callable[..., Any]:
    """A call of the arrays alone, which goes on from what the call before it left."""

    def call(*arrays: Any) -> Any:
        nonlocal kept
        out, kept = run(kept, *arrays)
        return out

    return call


def build(mechanism: str, backend: Any, job: Job, length: int, arrays: tuple[Any, ...]) -> Stream:
    """The stream of a mechanism up to `length` tokens; `arrays` are those of a step."""
    if mechanism == "exact":
        return {"jax": _exact_jax, "torch": _exact_torch}[backend.name](job, length, arrays)
    ops = importlib.import_module(registry.PACKAGES[backend.name])
    options = registry.vq_options(mechanism, job)
    has_query_codes = "codebook_q" in registry.MECHANISMS[mechanism].arrays
    v, codebook_k = arrays[2], arrays[-1]
    start = partial(ops.init_state, job.batch, codebook_k, job.value_width, dtype=v.dtype, **options)

    def step(state: Any, q: Any, k: Any, v: Any, *codebooks: Any) -> Any:
        codebook_q, codebook_k = codebooks if has_query_codes else (None, *codebooks)
        exact = {"is_causal": True, "scale": 1.0, "state": state, "return_state": True}
        return ops.vq_attention(q, k, v, codebook_q, codebook_k, **exact, **options)

    implementation = {"jax": "xla", "torch": "eager"}[backend.name]
    return Stream(start, lambda *arguments: step(*arguments)[1], step, implementation)


def _exact_jax(job: Job, length: int, arrays: tuple[Any, ...]) -> Stream:
    import jax
    import jax.numpy as jnp
    from jax import lax

    is_half = job.dtype in ("bfloat16", "float16")
    empty = tuple(jnp.zeros((x.shape[0], length, *x.shape[2:]), x.dtype) for x in arrays[1:3])

    def feed(kept: Any, q: Any, k: Any, v: Any) -> Any:
        keys, values, position = kept
        keys = lax.dynamic_update_slice_in_dim(keys, k, position, axis=1)
        values = lax.dynamic_update_slice_in_dim(values, v, position, axis=1)
        return keys, values, jnp.minimum(position + k.shape[1], length - 1).astype(jnp.int32)

    def step(kept: Any, q: Any, k: Any, v: Any, implementation: str) -> Any:
        n_seen = jnp.broadcast_to(kept[2] + 1, (q.shape[0],))
        keys, values, position = feed(kept, q, k, v)
        with jax.default_matmul_precision("default" if is_half else "highest"):
            out = jax.nn.dot_product_attention(
                q, keys, values, scale=1.0, key_value_seq_lengths=n_seen, implementation=implementation
            )
        return out, (keys, values, position)

    def start() -> Any:
        return *(jnp.copy(x) for x in empty), jnp.zeros((), jnp.int32)

    def can(implementation: str) -> bool:
        try:
            jax.jit(partial(step, implementation=implementation)).lower(start(), *arrays).compile()
        except (ValueError, NotImplementedError, RuntimeError):
            return False
        return True

    implementation = registry.jax_kernel(job)
    if implementation != "xla" and not can(implementation):
        implementation = "xla"
    return Stream(start, feed, partial(step, implementation=implementation), implementation)


def _exact_torch(job: Job, length: int, arrays: tuple[Any, ...]) -> Stream:
    import torch

    q, k, v = arrays
    empty = [torch.zeros((x.shape[0], length, *x.shape[2:]), dtype=x.dtype, device=x.device) for x in (k, v)]
    built = registry.build("exact", "torch", job, False, (q, *empty))

    def feed(kept: Any, q: Any, k: Any, v: Any) -> Any:
        keys, values, position = kept
        stop = position + k.shape[1]
        keys[:, position:stop], values[:, position:stop] = k, v
        return keys, values, min(stop, length - 1)

    def step(kept: Any, q: Any, k: Any, v: Any) -> Any:
        n_seen = kept[2] + 1
        kept = feed(kept, q, k, v)
        return built.fn(q, kept[0][:, :n_seen], kept[1][:, :n_seen]), kept

    return Stream(lambda: (*empty, 0), feed, step, built.implementation)
