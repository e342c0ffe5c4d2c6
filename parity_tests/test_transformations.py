"""`vq_attention` under what frameworks do to functions: vmap, checkpointing, functional gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import jax_vq
import torch_ref
from parity_tests.support import assert_close, to_jax, to_torch
from vq_common.cases import Case, case_inputs

CASE = Case(name="transformed", q_len=21, batch=3, is_causal=True)
FORMS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"is_causal": True, "block_len": 8},
    "window": {"is_causal": True, "block_len": 4, "mem_len": 5, "n_sink": 2},
}


def jax_op(form: str) -> Any:
    """q, k, v and the op of them, which adds up the sines of its output."""
    q, k, v, *books = (to_jax(x) for x in case_inputs(CASE)[:5])

    def op(q: Any, k: Any, v: Any) -> Any:
        return jax_vq.vq_attention(q, k, v, *books, **FORMS[form])

    return (q, k, v), op


@pytest.mark.parametrize("form", FORMS)
def test_jax_vmap_checkpoint_and_gradients_of_both(form: str) -> None:
    arrays, op = jax_op(form)

    def one(q: Any, k: Any, v: Any) -> Any:
        return op(q[None], k[None], v[None])[0]

    def loss(f: Any) -> Any:
        return lambda *a: jnp.sum(jnp.sin(f(*a)))

    @jax.jit
    def run(*arrays: Any) -> Any:
        every = (0, 1, 2)
        return (
            (op(*arrays), *jax.grad(loss(op), every)(*arrays)),
            (jax.vmap(one)(*arrays), *jax.grad(loss(jax.vmap(one)), every)(*arrays)),
            (jax.checkpoint(op)(*arrays), *jax.grad(loss(jax.checkpoint(op)), every)(*arrays)),
            (jax.vmap(one)(*arrays), *jax.vmap(jax.grad(loss(one), every))(*arrays)),
        )

    plain, *others = run(*arrays)
    for other in others:
        for found, expected in zip(other, plain, strict=True):
            assert_close(found, expected, "float64", "gradient")


def test_jax_forward_mode_is_refused() -> None:
    """A custom backward pass has no forward mode: an error, not a wrong tangent."""
    arrays, op = jax_op("causal")
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(op, arrays, arrays)


@pytest.mark.parametrize("form", FORMS)
def test_torch_func_and_checkpoint(form: str) -> None:
    q, k, v, *books = (to_torch(x) for x in case_inputs(CASE)[:5])

    def loss(q: Any, k: Any, v: Any) -> Any:
        return torch.sin(torch_ref.vq_attention(q, k, v, *books, **FORMS[form])).sum()

    functional = torch.func.grad(loss, (0, 1, 2))(q, k, v)
    leaves = tuple(x.clone().requires_grad_() for x in (q, k, v))
    plain = torch.autograd.grad(loss(*leaves), leaves)
    again = torch.autograd.grad(checkpoint(loss, *leaves, use_reentrant=False), leaves)
    for expected, *others in zip(plain, functional, again, strict=True):
        for found in others:
            assert_close(found, expected, "float64", "gradient")
