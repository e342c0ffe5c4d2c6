"""The GPU kernel of the exact window: what the op is tested for, where the kernel has a path of its own."""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

import jax_vq
from jax_vq.kernels import sizes
from parity_tests.support import assert_close, assert_gradient_close, to_jax
from parity_tests.vq_calls import attend, differentiable, optional
from vq_common import vq_oracle
from vq_common.cases import Case, Inputs, case_inputs

KERNELS: dict[str, Any] = {"implementation": "triton"}
WINDOWS = (
    {"block_len": 16, "mem_len": 16, "n_sink": 4},
    {"block_len": 64, "mem_len": 32, "n_sink": 0},  # a window that starts inside a block
    {"block_len": 32, "mem_len": 96, "n_sink": 40},  # one of several blocks, sinks that leave it late
    {"block_len": 256, "mem_len": 256, "n_sink": 1},  # of several tiles
)


@pytest.fixture(autouse=True)
def two_segments(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A segment after another, at a length that one segment would do for."""
    jax.clear_caches()
    monkeypatch.setattr(sizes, "n_segment", lambda length, n_row, tile: 2)
    yield
    jax.clear_caches()


def inputs_of(**changes: Any) -> Inputs:
    given = {"batch": 1, "q_len": 601, "n_head": 2, "has_bias": True} | changes
    return case_inputs(Case(name="window", is_causal=True, **given), "bfloat16")


def expected(inputs: Inputs, window: dict[str, Any]) -> np.ndarray:
    return vq_oracle.vq_attention(*inputs[:5], is_causal=True, **window, **optional(inputs))


def run(inputs: Inputs, window: dict[str, Any]) -> np.ndarray:
    return attend("jax", inputs, "bfloat16", is_causal=True, **KERNELS, **window)


def is_by_kernel(inputs: Inputs, window: dict[str, Any]) -> bool:
    arrays = [to_jax(x, "bfloat16") for x in inputs[:5]]
    options: dict[str, Any] = {"is_causal": True} | KERNELS | window
    return jax_vq.why_xla(jax_vq.vq_attention, *arrays, **options)["causal_attention"] is None


@pytest.mark.parametrize(
    "window, length, has_local",
    [*zip(WINDOWS, (101, 201, 201, 601), (True, False, False, True), strict=True)],
)
def test_the_kernel_matches_the_oracle(window: dict[str, Any], length: int, has_local: bool) -> None:
    inputs = inputs_of(q_len=length, has_local=has_local, n_kv_head=1, n_code_k=139, d_v=133)
    assert is_by_kernel(inputs, window)
    assert_close(run(inputs, window), expected(inputs, window), "bfloat16")


@pytest.mark.parametrize("length", [1, 17])
def test_sequences_shorter_than_a_window(length: int) -> None:
    inputs = inputs_of(batch=2, q_len=length)
    assert_close(run(inputs, WINDOWS[0]), expected(inputs, WINDOWS[0]), "bfloat16")


def test_gradients_go_on_from_what_the_kernel_leaves() -> None:
    window = WINDOWS[1]
    inputs = inputs_of(q_len=201, has_local=True)
    call = differentiable("jax", inputs, "bfloat16", is_causal=True, **KERNELS, **window)
    out, found = call(inputs.d_out)
    assert_close(out, expected(inputs, window), "bfloat16")
    options: dict[str, Any] = {"is_causal": True, **window, **optional(inputs)}
    targets = vq_oracle.vq_attention_gradients(*inputs[:5], inputs.d_out, **options)
    for name, target in targets._asdict().items():
        if target is not None:
            assert_gradient_close(getattr(found, name), target, "bfloat16")


def test_nonfinite_inputs_reach_the_rows_that_attend_to_them() -> None:
    window = WINDOWS[0]
    inputs = inputs_of(q_len=90, batch=2, has_local=True)
    clean = run(inputs, window)
    values = {"q": np.nan, "k": np.inf, "v": -np.inf, "q_local": np.inf, "k_local": -np.inf}
    # A sink; a key that is seen exactly by its block and the next, then through its code.
    for (name, value), t in itertools.product(values.items(), (2, 50)):
        x = getattr(inputs, name).copy()
        x[1, t, 1, 2] = value
        out = run(inputs._replace(**{name: x}), window)
        rows = np.zeros(out.shape, bool)
        last = t + 1 if name in ("q", "q_local") else None
        if name == "k_local" and t >= window["n_sink"]:
            last = (t // 16 + 2) * 16
        rows[1, t:last, 1, 2 if name == "v" else slice(None)] = True
        np.testing.assert_array_equal(np.isnan(out), rows)
        if name in ("q", "q_local", "k_local"):
            np.testing.assert_array_equal(out[~rows], clean[~rows])
        else:
            assert_close(out[~rows], clean[~rows], "bfloat16")


def test_the_future_changes_nothing() -> None:
    window = WINDOWS[1]
    inputs = inputs_of(q_len=300, n_head=1)
    before = run(inputs, window)
    for t in (1, 65, 200):
        changed = inputs._replace(q=inputs.q.copy(), k=inputs.k.copy(), v=inputs.v.copy())
        for x in (changed.q, changed.k, changed.v):
            x[:, t:] = 3.0
        np.testing.assert_array_equal(run(changed, window)[:, :t], before[:, :t])


def test_huge_scores_run_the_plain_way() -> None:
    window = WINDOWS[0]
    inputs = inputs_of(q_len=120)
    large = {name: 40 * getattr(inputs, name) for name in ("q", "k", "codebook_q", "codebook_k")}
    inputs = inputs._replace(**large)
    out, plain = (
        attend("jax", inputs, "bfloat16", is_causal=True, **window, **options)
        for options in (KERNELS, {"implementation": "xla"})
    )
    np.testing.assert_array_equal(out, plain)


def test_states_that_would_take_too_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_of(q_len=64)
    n_byte = 64 // 16 * 2 * 13 * 2 * 19  # blocks, heads, width and bytes of a value, codes
    for limit, is_within in ((n_byte, True), (n_byte - 1, False)):
        monkeypatch.setattr(sizes, "MAX_STATE_BYTES", limit)
        assert is_by_kernel(inputs, WINDOWS[0]) == is_within


@pytest.mark.parametrize(
    "window, reason",
    [
        ({"block_len": 24, "mem_len": 16}, "multiples of 16"),
        ({"block_len": 16, "mem_len": 0, "n_sink": 2}, "sinks without a window"),
        ({"block_len": 16, "mem_len": 16, "n_sink": 200}, "200 sinks"),
        ({"block_len": 16, "mem_len": 16, "return_state": True}, "one whole sequence"),
    ],
)
def test_what_no_kernel_runs_says_why(window: dict[str, Any], reason: str) -> None:
    inputs = inputs_of(q_len=40)
    arrays = [to_jax(x, "bfloat16") for x in inputs[:5]]
    options: dict[str, Any] = {"is_causal": True} | KERNELS | window
    found = jax_vq.why_xla(jax_vq.vq_attention, *arrays, **options)["causal_attention"]
    assert found is not None
    assert reason in found
