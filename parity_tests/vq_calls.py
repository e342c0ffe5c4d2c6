"""Calls of `vq_attention` on NumPy inputs, in either backend."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

import jax_vq
import torch_ref
from parity_tests.support import (
    forward_and_gradients_torch,
    to_jax,
    to_numpy,
    to_torch,
)
from vq_common.cases import Inputs
from vq_common.vq_oracle import VQGradients

BACKENDS = ("jax", "torch")
OF_TOKENS = ("q", "k", "v", "mask", "d_out", "segment_ids", "q_local", "k_local")
OPTIONAL = ("mask", "segment_ids", "q_local", "k_local", "code_bias")


def optional(inputs: Inputs) -> dict[str, np.ndarray]:
    """The arrays among `inputs` that a call takes by keyword and that are there."""
    return {name: getattr(inputs, name) for name in OPTIONAL if getattr(inputs, name) is not None}


def tokens(inputs: Inputs, where: slice) -> Inputs:
    """The inputs of some tokens of self-attention."""
    there = {name: getattr(inputs, name) for name in OF_TOKENS}
    return inputs._replace(**{name: x[:, where] for name, x in there.items() if x is not None})


def dialect(backend: str, device: Any = "cpu") -> tuple[Any, Callable[..., Any]]:
    """The package of a backend and what makes its arrays."""
    if backend == "jax":
        return jax_vq, to_jax
    return torch_ref, partial(to_torch, device=device)


def call(backend: str, inputs: Inputs, dtype: str = "float64", device: Any = "cpu", **options: Any) -> Any:
    """What `vq_attention` returns."""
    package, convert = dialect(backend, device)
    arrays = [convert(x, dtype) for x in inputs[:5]]
    extra = {name: convert(x, dtype) for name, x in optional(inputs).items()}
    return package.vq_attention(*arrays, **extra, **options)


def attend(
    backend: str, inputs: Inputs, dtype: str = "float64", device: Any = "cpu", **options: Any
) -> np.ndarray:
    """The outputs of `vq_attention`."""
    return to_numpy(call(backend, inputs, dtype, device, **options))


def differentiable(
    backend: str, inputs: Inputs, dtype: str = "float64", device: Any = "cpu", **options: Any
) -> Callable[[np.ndarray], tuple[np.ndarray, VQGradients]]:
    """`d_out` to outputs and the gradients of `sum(out * d_out)`; jax compiles it once."""
    package, convert = dialect(backend, device)
    names = [name for name in VQGradients._fields if getattr(inputs, name) is not None]
    primals = tuple(convert(getattr(inputs, name), dtype) for name in names)
    fixed = {
        name: convert(getattr(inputs, name), dtype)
        for name in ("codebook_q", "codebook_k", "mask", "segment_ids")
    }

    def op(*primals: Any) -> Any:
        return package.vq_attention(**dict(zip(names, primals, strict=True)), **fixed, **options)

    @jax.jit
    def run_jax(primals: Any, d_out: Any) -> Any:
        out, pull = jax.vjp(op, *primals)
        return out, pull(d_out)

    run: Any = run_jax if backend == "jax" else partial(forward_and_gradients_torch, op)

    def evaluate(d_out: np.ndarray) -> tuple[np.ndarray, VQGradients]:
        out, found = run(primals, convert(d_out, dtype))
        gradients = dict(zip(names, map(to_numpy, found), strict=True))
        return to_numpy(out), VQGradients(**gradients)

    return evaluate
