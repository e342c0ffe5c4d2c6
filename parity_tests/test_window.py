"""Exact window, sinks, packed documents and the bias of coded scores: what must hold whatever the values."""

from typing import Any

import numpy as np
import pytest

from parity_tests.support import assert_close
from parity_tests.vq_calls import BACKENDS, attend, differentiable, optional, tokens
from vq_common import oracle, vq_oracle
from vq_common.cases import Case, Inputs, case_inputs

each_backend = pytest.mark.parametrize("backend", BACKENDS)

WINDOW = {"is_causal": True, "block_len": 4, "mem_len": 3, "n_sink": 2}
FORMS = {
    "window": WINDOW,
    "pure_causal": {"is_causal": True, "block_len": 4},
    "pure_full": {"is_causal": False},
}
each_form = pytest.mark.parametrize("form", FORMS)
DOCUMENTS = (slice(0, 13), slice(13, 14), slice(14, 27), slice(27, 40))


def packed(form: str) -> Inputs:
    """Documents of 13, 1, 13 and 13 tokens; the first and the last have one id."""
    is_window = form == "window"
    case = Case(name="packed", q_len=40, n_head=4, n_kv_head=2, has_local=is_window, has_bias=is_window)
    row = np.repeat([5, 2, 7, 5], [13, 1, 13, 13]).astype(np.int32)
    return case_inputs(case)._replace(segment_ids=np.tile(row, (case.batch, 1)))


@pytest.mark.parametrize("mem_len, n_sink, has_local", [(31, 0, False), (31, 0, True), (0, 29, True)])
@each_backend
def test_a_window_over_everything_is_exact(backend: str, mem_len: int, n_sink: int, has_local: bool) -> None:
    case = Case(name="wide", q_len=29, n_head=4, n_kv_head=2, is_padded=True, has_local=has_local)
    inputs = case_inputs(case)
    q, k = (inputs.q_local, inputs.k_local) if has_local else (inputs.q, inputs.k)
    k, v = (vq_oracle.for_query_heads(x, case.n_head) for x in (k, inputs.v))
    scale = case.d_k**-0.5
    expected = oracle.dot_product_attention(q, k, v, is_causal=True, scale=scale, mask=inputs.mask).out
    out = attend(backend, inputs, is_causal=True, block_len=7, mem_len=mem_len, n_sink=n_sink)
    assert_close(out, expected, "float64")


@pytest.mark.parametrize("is_causal", [False, True])
@each_backend
def test_without_window_and_sinks_local_vectors_change_nothing(backend: str, is_causal: bool) -> None:
    case = Case(name="unused", q_len=29, has_local=True, is_padded=True)
    inputs = case_inputs(case)
    pure = inputs._replace(q_local=None, k_local=None)
    options = {"is_causal": is_causal, "block_len": 8}
    out, gradients = differentiable(backend, inputs, **options, mem_len=0, n_sink=0)(inputs.d_out)
    expected, expected_gradients = differentiable(backend, pure, **options)(inputs.d_out)
    np.testing.assert_array_equal(out, expected)
    for found, target in zip(gradients[:3], expected_gradients[:3], strict=True):
        np.testing.assert_array_equal(found, target)
    assert np.all(gradients.q_local == 0)
    assert np.all(gradients.k_local == 0)


@each_form
@each_backend
def test_packed_is_alone(backend: str, form: str) -> None:
    """A document gives what it gives alone, also behind padding of NaN that is no whole block."""
    inputs = packed(form)
    out = attend(backend, inputs, **FORMS[form])
    for document in DOCUMENTS:
        alone = tokens(inputs, document)._replace(segment_ids=None)
        assert_close(attend(backend, alone, **FORMS[form]), out[:, document], "float64")
    shifted = attend(backend, behind_padding(alone, 3), **FORMS[form])
    assert_close(shifted[:, 3:], out[:, document], "float64")


def behind_padding(inputs: Inputs, n: int) -> Inputs:
    def pad(x: Any) -> Any:
        return None if x is None else np.pad(x, ((0, 0), (n, 0), (0, 0), (0, 0)), constant_values=np.nan)

    mask = np.ones(inputs.q.shape[:2], bool)
    return inputs._replace(
        q=pad(inputs.q),
        k=pad(inputs.k),
        v=pad(inputs.v),
        q_local=pad(inputs.q_local),
        k_local=pad(inputs.k_local),
        mask=np.pad(mask, ((0, 0), (n, 0))),
    )


@each_form
@each_backend
def test_gradients_stay_in_their_document(backend: str, form: str) -> None:
    """Zero in all others, exactly."""
    inputs = packed(form)
    evaluate = differentiable(backend, inputs, **FORMS[form])
    for document in DOCUMENTS:
        d_out = np.zeros_like(inputs.d_out)
        d_out[:, document] = inputs.d_out[:, document]
        gradients = evaluate(d_out)[1]._replace(code_bias=None)
        for name, gradient in gradients._asdict().items():
            if gradient is not None:
                assert np.all(np.delete(gradient, np.r_[document], axis=1) == 0), name
        assert np.all(np.any(gradients.v[:, document], axis=-1))


@pytest.mark.parametrize("is_causal", [False, True])
@each_backend
def test_a_bias_of_all_scores_cancels(backend: str, is_causal: bool) -> None:
    inputs = case_inputs(Case(name="biased", q_len=37, has_bias=True, is_padded=True))
    options = {"is_causal": is_causal, "block_len": 8}
    out, gradients = differentiable(backend, inputs, **options)(inputs.d_out)
    assert_close(out, attend(backend, inputs._replace(code_bias=None), **options), "float64")
    assert np.abs(gradients.code_bias).max() < 1e-9


@each_backend
def test_a_low_bias_leaves_the_exact_part(backend: str) -> None:
    """Coded keys vanish: what is left is exact attention over window and sinks."""
    case = Case(name="low_bias", q_len=37, has_local=True, has_bias=True, is_padded=True)
    inputs = case_inputs(case)
    inputs = inputs._replace(code_bias=np.full(case.n_head, -1e4))
    pairs = vq_oracle.attention_pairs(*inputs[:2], *inputs[3:5], mask=inputs.mask, **WINDOW)
    assert pairs.is_coded.any()
    is_seen = pairs.is_exact.astype(np.float64)
    scale = case.d_k**-0.5
    expected = oracle.softmax_attention(inputs.q_local, inputs.k_local, inputs.v, is_seen, scale).out
    # Scattered padding can leave a query whose keys are all coded.
    has_exact = pairs.is_exact.any(axis=(1, 3))
    assert has_exact.any()
    assert_close(attend(backend, inputs, **WINDOW)[has_exact], expected[has_exact], "float64")


STEP = 1e-5
TRUNCATION = 1e-7  # of a central difference with STEP, relative; no matter of the implementation


@each_backend
def test_gradients_are_derivatives(backend: str) -> None:
    """Central differences; each query and key is a code of its own, so that codes move with them."""
    case = Case(name="steps", q_len=23, n_head=4, n_kv_head=2, has_local=True, has_bias=True, is_padded=True)
    inputs = case_inputs(case)
    row = np.repeat([3, 1, 3], [9, 1, 13]).astype(np.int32)
    inputs = coded_by_themselves(inputs._replace(segment_ids=np.tile(row, (case.batch, 1))))
    gradients = differentiable(backend, inputs, **WINDOW)(inputs.d_out)[1]
    rng = np.random.default_rng(0)
    for name, gradient in gradients._asdict().items():
        direction = rng.normal(size=gradient.shape)
        ends = [
            coded_by_themselves(inputs._replace(**{name: getattr(inputs, name) + step * direction}))
            for step in (STEP, -STEP)
        ]
        high, low = ((attend(backend, end, **WINDOW) * inputs.d_out).sum() for end in ends)
        slope = (gradient * direction).sum()
        assert abs((high - low) / (2 * STEP) - slope) <= TRUNCATION * abs(slope), name


def coded_by_themselves(inputs: Inputs) -> Inputs:
    """The codebooks are the vectors: `q^ = q` and `k^ = k`."""
    book_q, book_k = (np.concatenate(x, axis=0).swapaxes(0, 1) for x in (inputs.q, inputs.k))
    return inputs._replace(codebook_q=book_q, codebook_k=book_k)


@pytest.mark.parametrize("has_local", [False, True])
@each_backend
def test_nonfinite_inputs_reach_the_rows_that_attend_to_them(backend: str, has_local: bool) -> None:
    """Not the rows of another document, nor earlier ones."""
    case = Case(name="nonfinite_window", q_len=31, n_head=4, n_kv_head=2, has_local=has_local)
    inputs = case_inputs(case, "float32")
    row = np.repeat([5, 2, 5], [9, 1, 21]).astype(np.int32)
    inputs = inputs._replace(segment_ids=np.tile(row, (case.batch, 1)))
    pairs = vq_oracle.attention_pairs(*inputs[:2], *inputs[3:5], **optional(inputs), **WINDOW)
    is_exact, is_coded = pairs.is_exact[1, 0], pairs.is_coded[1, 0]
    clean = attend(backend, inputs, "float32", **WINDOW)
    for t in (3, 9, 10, 17):
        itself = np.arange(case.q_len) == t
        sees = is_exact[:, t] | is_coded[:, t]
        uses_code = is_coded[:, t] if has_local else sees
        assert sees.sum() < case.q_len
        for name, value, may, must in (
            ("q", np.nan, itself, itself & (is_coded.any(1) | (not has_local))),
            ("k", np.inf, sees, uses_code),
            ("v", np.nan, sees, sees),
            ("v", -np.inf, sees, sees),
            ("q_local", np.nan, itself, itself),
            ("k_local", np.inf, sees, is_exact[:, t]),
        ):
            if getattr(inputs, name) is None:
                continue
            x = getattr(inputs, name).copy()
            x[1, t, 1, 2] = value
            out = attend(backend, inputs._replace(**{name: x}), "float32", **WINDOW)
            heads = [1] if name.startswith("q") else [2, 3]
            columns = [2] if name == "v" else range(case.d_v)
            may_cell, must_cell = (cells(out.shape, rows, heads, columns) for rows in (may, must))
            np.testing.assert_array_equal(out[~may_cell], clean[~may_cell], err_msg=f"{name} {t}")
            assert np.isnan(out[must_cell]).all(), f"{name} {t}"


def cells(shape: tuple[int, ...], rows: np.ndarray, heads: Any, columns: Any) -> np.ndarray:
    """Where an output of sequence 1 lies in these rows, heads and columns."""
    chosen = np.zeros(shape, bool)
    chosen[np.ix_(np.array([1]), np.flatnonzero(rows), np.array(heads), np.array(columns))] = True
    return chosen


@each_backend
def test_padded_keys_change_nothing(backend: str) -> None:
    case = Case(name="padded_window", q_len=41, batch=3, is_padded=True, has_local=True, n_segment=3)
    inputs = case_inputs(case, "float32")
    clean = attend(backend, inputs, "float32", **WINDOW)
    assert inputs.mask is not None
    assert inputs.k_local is not None
    k, v, k_local = inputs.k.copy(), inputs.v.copy(), inputs.k_local.copy()
    k[~inputs.mask], v[~inputs.mask], k_local[~inputs.mask] = np.nan, np.inf, np.nan
    hidden = inputs._replace(k=k, v=v, k_local=k_local)
    np.testing.assert_array_equal(attend(backend, hidden, "float32", **WINDOW), clean)
    assert np.all(clean[1] == 0)
    assert np.all(clean[0, : inputs.mask[0].argmax()] == 0)
