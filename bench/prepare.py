"""From text (or noise, or what is captured) to q, k, v and codebooks: what one worker does for all."""

from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench import host, inputs
from bench.inputs import CHUNK, Store
from bench.job import Job
from vq_common import TransformerConfig

N_FIT = 8_192  # vectors that codebooks are fitted on,
FIT_PER_CODE = 4  # and of a large codebook at least as many for each code
MAX_THREADS = 8  # that fill a store: each holds some hundred MiB


def module_config(job: Job) -> TransformerConfig:
    """The configuration of the module whose projections give q, k, v: in float32 whatever is timed."""
    return TransformerConfig(
        d_model=job.d_model,
        n_head=job.heads,
        d_k=job.width,
        d_v=job.value_width,
        n_code_q=job.codes_q,
        n_code_k=job.codes_k,
    )


class Preparer:
    """Fills a `Store`: codebooks and directions at once, tokens as far as they are asked for.

    Args:
      store: of a job.
      backend: whose module and k-means are used; another one would give other vectors.
      held_out: tokens after those of the store that codebooks are fitted on; 0: those of the store.
    """

    def __init__(self, store: Store, backend: Any, held_out: int = 0) -> None:
        job = store.job
        self.store, self.job, self.backend, self.held_out = store, job, backend, held_out
        self._projecting = Lock()
        self.text: NDArray[np.uint8] | None = None
        if job.input == "real":
            self.text = inputs.stdlib_text(job.batch * store.length + held_out)
            self.tables = inputs.embedding_tables(job)
            self.project = backend.projector(module_config(job))
        if job.input == "captured":
            names = ("q", "k", "v", "fit_q", "fit_k")
            self.captured = {name: store.read(f"captured_{name}") for name in names}

    def create(self) -> None:
        """Make the files, fit the codebooks, draw the directions."""
        self.store.create()
        self.store.write("directions", inputs.directions(self.job))
        self._fit_codebooks()

    def fill(self, length: int, filled: int) -> int:
        """Write whole chunks of tokens from `filled` until there are `length`; how many there are then."""
        starts = self.store.length * np.arange(self.job.batch)[:, None]
        chunks = [(start, min(start + CHUNK, self.store.length)) for start in range(filled, length, CHUNK)]

        def write(chunk: tuple[int, int]) -> int:
            start, stop = chunk
            q, k, v = self._qkv(starts + np.arange(start, stop))
            self.store.write_tokens(start, q=q, k=k, v=v)
            return stop

        # Most of a chunk is NumPy on one core.
        with ThreadPoolExecutor(min(MAX_THREADS, max(host.n_core() // 2, 1))) as threads:
            return max(threads.map(write, chunks), default=filled)

    def _qkv(self, positions: NDArray[Any]) -> tuple[NDArray[np.float32], ...]:
        """q, k, v `[B, N, H, .]` of positions `[B, N]` in the text."""
        if self.job.input == "captured":
            q, k, v = (self.captured[name] for name in ("q", "k", "v"))
            return tuple(x.reshape(-1, *x.shape[2:])[positions] for x in (q, k, v))
        if self.text is None:
            return inputs.random_qkv(self.job, positions)
        x = inputs.embed(self.tables, self.text, positions)
        with self._projecting:  # not every device takes calls of several threads
            qkv: tuple[NDArray[np.float32], ...] = self.project(x)
        return qkv

    def _fit_codebooks(self) -> None:
        positions, vectors = self._fit_vectors()
        for name, x in zip("qk", vectors, strict=True):
            n_code = self.job.codes_q if name == "q" else self.job.codes_k
            draws = inputs.code_draws(self.job, n_code, positions, self.text)
            codebook = self.backend.fit_codebook(x, draws)
            self.store.write(f"codebook_{name}", codebook)

    def _fit_vectors(self) -> tuple[NDArray[Any], list[NDArray[np.float32]]]:
        """Positions `[N]` and the q and k `[1, N, H, D]` there, of a captured layer those of other text."""
        if self.job.input == "captured":
            q, k = (self.captured[name] for name in ("fit_q", "fit_k"))
            return np.arange(q.shape[0] * q.shape[1]), [x.reshape(1, -1, *x.shape[2:]) for x in (q, k)]
        positions = self._fit_positions()
        pieces = [positions[start : start + CHUNK] for start in range(0, len(positions), CHUNK)]
        parts = [self._qkv(piece[None])[:2] for piece in pieces]
        return positions, [np.concatenate(x, axis=1) for x in zip(*parts, strict=True)]

    def _fit_positions(self) -> NDArray[np.int64]:
        """Tokens that codebooks are fitted on: spread over the text, or consecutive ones of noise.

        Where the module stands for a layer they are of the second half of the text, which is not evaluated.
        """
        n_fit = max(N_FIT, FIT_PER_CODE * max(self.job.codes_q, self.job.codes_k))
        if self.text is None:
            start = -(-self.store.length // CHUNK) * CHUNK if self.held_out else 0
            return np.arange(start, start + min(self.held_out or self.store.length, n_fit))
        total = self.job.batch * self.store.length
        start, stop = 0 if self.job.layer is None else total // 2, total
        if self.held_out:
            start, stop = total, total + self.held_out
        return np.unique(np.linspace(start, stop - 1, min(n_fit, stop - start)).astype(np.int64))
