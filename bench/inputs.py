"""Inputs that every backend sees alike: real text as vectors, drawn numbers, arrays on disk.

Everything here is NumPy. `prepare.py` turns the vectors into q, k, v and codebooks.
"""

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.job import Job
from vq_common.oracle import hyper_depth

N_LAG = 4  # bytes of context that a vector shows
CHUNK = 8192  # tokens prepared at once


def stdlib_text(n_bytes: int) -> NDArray[np.uint8]:
    """The first bytes of Python's own standard library, module after module in sorted order.

    Raises:
      RuntimeError: the installation has less source text than that.
    """
    text = bytearray()
    for path in _stdlib_files():
        text += path.read_bytes()
        if len(text) >= n_bytes:
            return np.frombuffer(bytes(text[:n_bytes]), np.uint8)
    raise RuntimeError(
        f"the standard library of this Python has {len(text):,} bytes of source, {n_bytes:,} are needed: "
        f"ask for shorter --lengths or use --random"
    )


def _stdlib_files() -> Iterator[Path]:
    for folder, folders, files in os.walk(sysconfig.get_paths()["stdlib"]):
        folders[:] = sorted(set(folders) - {"site-packages", "dist-packages", "__pycache__"})
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


def embedding_tables(job: Job) -> NDArray[np.float32]:
    """One random vector for every byte at every lag: `[N_LAG, 256, d_model]`."""
    rng = np.random.default_rng([job.seed, 1])
    return rng.standard_normal((N_LAG, 256, job.d_model), np.float32)


def embed(
    tables: NDArray[np.float32], text: NDArray[np.uint8], positions: NDArray[Any]
) -> NDArray[np.float32]:
    """Vectors `[..., d_model]` of the bytes at `positions [...]`: the sum over the last N_LAG bytes.

    A vector depends on its context, so that equal bytes differ; before the text are zero bytes.
    """
    padded = np.concatenate([np.zeros(N_LAG - 1, np.uint8), text])
    x = tables[0][padded[positions + N_LAG - 1]]
    for lag in range(1, N_LAG):
        x += tables[lag][padded[positions + N_LAG - 1 - lag]]
    return x


def random_qkv(job: Job, positions: NDArray[Any]) -> tuple[NDArray[np.float32], ...]:
    """Gaussian q, k, v for consecutive `positions [B, N]`, the same however they are cut at `CHUNK`s.

    The scale of q and k is that of the modules, so that scores have variance 1.
    """
    rng = np.random.default_rng([job.seed, 2, int(positions[0, 0]) // CHUNK])
    tokens = *positions.shape, job.heads
    q, k = (rng.standard_normal((*tokens, job.width), np.float32) * job.width**-0.25 for _ in range(2))
    return np.float32(1) * q, np.float32(1) * k, rng.standard_normal((*tokens, job.value_width), np.float32)


def directions(job: Job) -> NDArray[np.float32]:
    """Hash directions `[H, P, D]`."""
    rng = np.random.default_rng([job.seed, 3])
    return rng.standard_normal((job.heads, job.n_projection, job.width), np.float32)


def sample_sizes(length: int, is_causal: bool, min_seq_len: int) -> tuple[int, ...]:
    """Number of keys of every unmasked sub-problem, in the order of `oracle.hyper_weight`."""
    if not is_causal:
        return (length,)
    depth = hyper_depth(length, min_seq_len)
    leaf = -(-length // 2**depth)
    return tuple(leaf * 2 ** (depth - level - 1) for level in range(depth) for _ in range(2**level))


def sample_ids(job: Job, length: int, is_causal: bool) -> NDArray[np.int32]:
    """Sampled keys `[B, R, N, H]` of HyperAttention."""
    rng = np.random.default_rng([job.seed, 4, length, int(is_causal)])
    sizes = np.asarray(sample_sizes(length, is_causal, job.min_seq_len), np.int64)
    shape = job.batch, len(sizes), job.n_sample, job.heads
    return rng.integers(0, sizes[None, :, None, None], shape).astype(np.int32)


def cotangent(job: Job, length: int) -> NDArray[Any]:
    """What is pulled back, Gaussian `[B, T, H, V]`, kept as a `Store` keeps tokens."""
    rng = np.random.default_rng([job.seed, 6, length])
    d_out = rng.standard_normal((job.batch, length, job.heads, job.value_width), np.float32)
    return to_bfloat16(d_out) if job.dtype == "bfloat16" else d_out


def code_draws(
    job: Job, n_code: int, positions: NDArray[Any], text: NDArray[np.uint8] | None
) -> NDArray[np.float32]:
    """Numbers in [0, 1), `[H, C]`, that make k-means start from vectors of different contexts.

    Source text repeats itself: a plain draw would start many codes from runs of blanks.
    """
    rng = np.random.default_rng([job.seed, 5, n_code])
    n_vector = len(positions)
    candidates = np.arange(n_vector)
    if text is not None:
        padded = np.concatenate([np.zeros(N_LAG - 1, np.uint8), text])
        context = padded[positions[:, None] + np.arange(N_LAG)]
        candidates = np.unique(context, axis=0, return_index=True)[1]
    is_enough = len(candidates) >= n_code
    picked = [rng.choice(candidates, n_code, replace=not is_enough) for _ in range(job.heads)]
    return ((np.stack(picked) + 0.5) / n_vector).astype(np.float32)


class Store:
    """q, k, v `[B, T, H, .]` and codebooks as .npy files, filled from the front as far as needed.

    Tokens are kept in the job's precision: bfloat16 as its bits, float64 as float32 (exactly
    representable in it, so nothing differs between backends).
    """

    def __init__(self, folder: str | Path, job: Job, length: int) -> None:
        self.folder = Path(folder)
        self.job = job
        self.length = length

    def create(self) -> None:
        """Make the files; they take space only where something is written."""
        for name in ("q", "k", "v"):
            shape = (self.job.batch, self.length, self.job.heads, self._width(name))
            np.lib.format.open_memmap(self._path(name), "w+", self._dtype, shape).flush()

    def write_tokens(self, start: int, **arrays: NDArray[np.float32]) -> None:
        """Write float32 `[B, N, H, .]` at tokens `[start, start + N)`."""
        for name, x in arrays.items():
            file = np.load(self._path(name), mmap_mode="r+")
            file[:, start : start + x.shape[1]] = to_bfloat16(x) if self._is_bfloat16 else x
            file.flush()

    def read_tokens(self, name: str, length: int, start: int = 0) -> NDArray[Any]:
        """The tokens from `start` to `length` as they are kept."""
        return np.array(np.load(self._path(name), mmap_mode="r")[:, start:length])

    def read_float64(self, name: str, length: int) -> NDArray[np.float64]:
        """The first `length` tokens, with the values that every backend gets."""
        return self.to_float64(self.read_tokens(name, length))

    def to_float64(self, x: NDArray[Any]) -> NDArray[np.float64]:
        """The values of tokens as they are kept."""
        return (from_bfloat16(x) if self._is_bfloat16 else x).astype(np.float64)

    def write(self, name: str, x: NDArray[Any]) -> None:
        """Write any other array."""
        np.save(self._path(name), x)

    def read(self, name: str) -> NDArray[Any]:
        """Read any other array."""
        array: NDArray[Any] = np.load(self._path(name))
        return array

    @property
    def _is_bfloat16(self) -> bool:
        return self.job.dtype == "bfloat16"

    @property
    def _dtype(self) -> type:
        return np.uint16 if self._is_bfloat16 else np.float32

    def _width(self, name: str) -> int:
        return self.job.value_width if name == "v" else self.job.width

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"


def token_bytes(job: Job) -> int:
    """Bytes that one token of q, k, v takes in a `Store`."""
    itemsize = 2 if job.dtype == "bfloat16" else 4
    return itemsize * job.batch * job.heads * (2 * job.width + job.value_width)


def to_bfloat16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of the nearest bfloat16 values, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (bits >> np.uint32(16)).astype(np.uint16)


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The values that bfloat16 bits stand for."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
