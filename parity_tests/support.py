"""Moving arrays between NumPy, jax and torch, and running one op in both backends."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from bench.cost import inner_jaxprs
from vq_common.tolerances import TOLERANCES, relative_rms

DTYPES = ("float64", "float32", "bfloat16")


def to_jax(x: Any, dtype: str | None = None) -> Any:
    """NumPy to jax; floats in `dtype`, the rest as it is, None stays None."""
    if x is None:
        return None
    return jnp.asarray(x, dtype if np.issubdtype(np.asarray(x).dtype, np.floating) else None)


def to_torch(x: Any, dtype: str | None = None, device: Any = "cpu") -> Any:
    """NumPy to torch; floats in `dtype`, the rest as it is, None stays None."""
    if x is None:
        return None
    x = np.asarray(x)
    if np.issubdtype(x.dtype, np.floating) and dtype is not None:
        kind = getattr(torch, dtype)
        return torch.tensor(x.astype(np.float64 if dtype == "float64" else np.float32)).to(kind).to(device)
    return torch.tensor(x).to(device)


def to_numpy(x: Any) -> np.ndarray:
    """jax or torch to NumPy; floats become float64."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        x = (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    x = np.asarray(x)
    is_float = x.dtype == jnp.bfloat16 or np.issubdtype(x.dtype, np.floating)
    return x.astype(np.float64) if is_float else x


def forward_and_gradients_jax(op: Any, primals: tuple[Any, ...], d_out: Any) -> tuple[Any, tuple[Any, ...]]:
    """`op(*primals)` and the pullback of `d_out`, in one compilation."""

    @jax.jit
    def run(primals: tuple[Any, ...], d_out: Any) -> tuple[Any, tuple[Any, ...]]:
        out, pull = jax.vjp(op, *primals)
        return out, pull(d_out)

    return run(primals, d_out)


def forward_and_gradients_torch(op: Any, primals: tuple[Any, ...], d_out: Any) -> tuple[Any, tuple[Any, ...]]:
    """`op(*primals)` and the gradients of `sum(out * d_out)`."""
    primals = tuple(x.detach().requires_grad_() for x in primals)
    out = op(*primals)
    return out, torch.autograd.grad(out, primals, d_out, materialize_grads=True)


def equations(jaxpr: Any, primitive: str) -> list[Any]:
    """All equations of a primitive, of those inside other equations too."""
    found = []
    for equation in jaxpr.eqns:
        found += [equation] if equation.primitive.name == primitive else []
        for inner in inner_jaxprs(equation.params):
            found += equations(inner, primitive)
    return found


def assert_close(actual: Any, expected: Any, dtype: str, what: str = "forward", limits: int = 1) -> None:
    """Relative RMS within the tolerance table; `limits` 2 between two results that each may be off."""
    limit = limits * getattr(TOLERANCES[dtype], what)
    error = relative_rms(to_numpy(actual), to_numpy(expected))
    assert error <= limit, f"{what} {dtype}: relative RMS {error:.3g} over {limit:.3g}"


def assert_gradient_close(actual: Any, expected: np.ndarray, dtype: str) -> None:
    """As `assert_close`; a gradient that is 0 up to rounding has no relative error.

    With one visible key the softmax is constant: q and k have no gradient.
    """
    if np.abs(expected).max() > 1e-9:
        assert_close(actual, expected, dtype, "gradient")
    else:
        assert np.abs(to_numpy(actual)).max() < (1e-9 if dtype == "float64" else 1e-2)
