"""Half types with XLA's own flags: the flags of `conftest.py` choose other matrix products on a CPU."""

import os
import subprocess
import sys
from typing import Any

import jax
import pytest

import jax_vq
from bench.host import ROOT
from parity_tests.support import assert_close, assert_gradient_close, to_jax
from parity_tests.vq_calls import optional
from vq_common import vq_oracle
from vq_common.cases import case_inputs, cases
from vq_common.vq_oracle import VQGradients

NAMES = ("small_causal", "grouped_full", "keys_only_full")


def check(name: str, dtype: str) -> None:
    """Outputs and gradients of a case against the oracle, codebooks among the arguments: no constants."""
    (case,) = (case for case in cases("ci") if case.name == name)
    inputs = case_inputs(case, dtype)
    extra = optional(inputs)
    arrays = dict(zip(inputs._fields[:5], inputs[:5], strict=True)) | extra
    arrays = {key: to_jax(x, dtype) for key, x in arrays.items()}
    primals = {key: x for key, x in arrays.items() if key in VQGradients._fields and x is not None}

    @jax.jit
    def run(primals: Any, arrays: Any, d_out: Any) -> Any:
        out, pull = jax.vjp(lambda x: jax_vq.vq_attention(**(arrays | x), **case.options), primals)
        return out, *pull(d_out)

    out, found = run(primals, arrays, to_jax(inputs.d_out, dtype))
    assert_close(out, vq_oracle.vq_attention(*inputs[:5], **case.options, **extra), dtype)
    targets = vq_oracle.vq_attention_gradients(*inputs[:5], inputs.d_out, **case.options, **extra)
    for key, gradient in found.items():
        assert_gradient_close(gradient, getattr(targets, key), dtype)


@pytest.mark.slow
def test_bfloat16_gradients_with_the_flags_of_xla() -> None:
    code = f"from parity_tests.test_half_types import check; [check(name, 'bfloat16') for name in {NAMES}]"
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
