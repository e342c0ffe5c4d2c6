"""Streaming: feeding a sequence in pieces gives what feeding it whole gives."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import jax_vq
import torch_ref
from bench.host import fast_compile_flags
from parity_tests.support import assert_close, assert_gradient_close, to_jax, to_numpy
from parity_tests.vq_calls import BACKENDS, attend, call, dialect, differentiable, optional, tokens
from vq_common import vq_oracle
from vq_common.cases import LOCAL_WIDTH, Case, Inputs, case_inputs

each_backend = pytest.mark.parametrize("backend", BACKENDS)

LENGTH = 53
EVERYTHING = Case(
    name="stream_everything",
    batch=3,
    q_len=LENGTH,
    n_head=4,
    n_kv_head=2,
    block_len=5,
    mem_len=3,
    n_sink=2,
    n_segment=4,
    has_local=True,
    has_bias=True,
    is_padded=True,
    is_causal=True,
)
STREAMS = (
    Case(name="stream_pure", q_len=LENGTH, is_causal=True),
    Case(name="stream_window_16_16", q_len=LENGTH, mem_len=16, is_causal=True),
    Case(name="stream_window_7_13", q_len=LENGTH, block_len=7, mem_len=13, has_local=True, is_causal=True),
    Case(name="stream_sinks", q_len=LENGTH, n_sink=5, is_causal=True),
    Case(name="stream_keys_only", q_len=LENGTH, keys_only=True, is_causal=True),
    Case(name="stream_grouped", q_len=LENGTH, n_head=4, n_kv_head=2, is_causal=True),
    Case(name="stream_segments", q_len=LENGTH, block_len=5, mem_len=3, n_segment=5, is_causal=True),
    Case(name="stream_padded", q_len=LENGTH, block_len=7, mem_len=13, is_padded=True, is_causal=True),
    EVERYTHING,
)
# jax compiles once per length of a piece: a few lengths, at random places all the same.
PIECES = {"jax": (1, 3, 17), "torch": range(1, 21)}


@cache
def whole(case: Case, dtype: str = "float64") -> tuple[Inputs, np.ndarray]:
    """The inputs of a case and the outputs of its oracle."""
    inputs = case_inputs(case, dtype)
    return inputs, vq_oracle.vq_attention(*inputs[:5], **case.options, **optional(inputs))


def names(case: Case) -> str:
    return case.name


def cut(length: int, drawn: list[int], allowed: Sequence[int]) -> list[int]:
    """Sizes of pieces, each one that is allowed, that make up `length`."""
    sizes: list[int] = []
    while rest := length - sum(sizes):
        size = allowed[drawn[len(sizes) % len(drawn)] % len(allowed)]
        sizes.append(size if size <= rest else max(x for x in allowed if x <= rest))
    return sizes


def feed(
    backend: str,
    case: Case,
    inputs: Inputs,
    sizes: Sequence[int],
    *,
    state: Any = None,
    dtype: str = "float64",
    between: Callable[[Any], Any] = lambda state: state,
) -> tuple[np.ndarray, Any]:
    """Outputs of all tokens, fed in pieces of these sizes, and the last state."""
    assert sum(sizes) == inputs.q.shape[1]
    outs = []
    for end, size in zip(accumulate(sizes), sizes, strict=True):
        piece = tokens(inputs, slice(end - size, end))
        out, state = call(backend, piece, dtype, **case.options, state=state, return_state=True)
        outs.append(to_numpy(out))
        state = between(state)
    return np.concatenate(outs, axis=1), state


def start_of(backend: str, case: Case, inputs: Inputs, **changes: Any) -> Any:
    """The state of a case that has seen nothing."""
    package, convert = dialect(backend)
    sizes = {
        "batch": case.batch,
        "codebook_k": convert(inputs.codebook_k),
        "value_width": case.d_v,
        "local_width": LOCAL_WIDTH if case.has_local else None,
        "block_len": case.block_len,
        "mem_len": case.mem_len,
        "n_sink": case.n_sink,
    }
    return package.init_state(**(sizes | changes))


def kinds(state: Any) -> list[tuple[tuple[int, ...], str]]:
    """Shape and type of all that a state holds."""
    return [(tuple(x.shape), str(x.dtype)) for x in jax.tree.leaves(state)]


def assert_same(first: Any, second: Any) -> None:
    assert kinds(first) == kinds(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(to_numpy(a), to_numpy(b))


@pytest.mark.parametrize("case", STREAMS, ids=names)
@each_backend
@settings(max_examples=3)
@example(drawn=[0])
@given(drawn=st.lists(st.integers(0, 19), min_size=2, max_size=8))
def test_pieces_give_what_the_whole_gives(backend: str, case: Case, drawn: list[int]) -> None:
    """Cut anywhere, and token by token; the state has one size, however much it has seen."""
    inputs, expected = whole(case)
    nothing = kinds(start_of(backend, case, inputs))

    def as_large_as_ever(state: Any) -> Any:
        assert kinds(state) == nothing
        return state

    sizes = cut(LENGTH, drawn, PIECES[backend])
    out, _ = feed(backend, case, inputs, sizes, between=as_large_as_ever)
    assert_close(out, expected, "float64")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@each_backend
def test_pieces_in_lower_precision(backend: str, dtype: str) -> None:
    inputs, expected = whole(EVERYTHING, dtype)
    out, state = feed(backend, EVERYTHING, inputs, [17, 17, 17, 1, 1], dtype=dtype)
    assert_close(out, expected, dtype)
    codebook = dialect(backend)[1](inputs.codebook_k, dtype)
    nothing = start_of(backend, EVERYTHING, inputs, codebook_k=codebook)
    assert kinds(state) == kinds(nothing)


@each_backend
def test_a_state_lives_in_a_file(backend: str, tmp_path: Path) -> None:
    """Saved and read again between any two pieces, nothing changes, not in the last bit."""
    inputs = whole(EVERYTHING)[0]
    path = tmp_path / "state.safetensors"

    def through_file(state: Any) -> Any:
        leaves, structure = jax.tree.flatten(state)
        arrays = [x.numpy() if backend == "torch" else np.asarray(x) for x in leaves]
        save_file({str(i): np.array(x, order="C") for i, x in enumerate(arrays)}, path)
        read = load_file(path)
        convert = torch.from_numpy if backend == "torch" else jnp.asarray
        return jax.tree.unflatten(structure, [convert(read[str(i)]) for i in range(len(leaves))])

    sizes = [17, 3, 1, 3, 17, 3, 3, 3, 3]
    out, state = feed(backend, EVERYTHING, inputs, sizes)
    again, state_again = feed(backend, EVERYTHING, inputs, sizes, between=through_file)
    np.testing.assert_array_equal(again, out)
    assert_same(state_again, state)


@pytest.mark.parametrize("case", [STREAMS[0], EVERYTHING], ids=names)
@each_backend
def test_no_state_is_the_state_that_has_seen_nothing(backend: str, case: Case) -> None:
    inputs = tokens(whole(case)[0], slice(0, 17))
    first = feed(backend, case, inputs, [17])
    second = feed(backend, case, inputs, [17], state=start_of(backend, case, inputs))
    np.testing.assert_array_equal(first[0], second[0])
    assert_same(first[1], second[1])
    # Without a state to return it is another program, which may round otherwise.
    np.testing.assert_allclose(attend(backend, inputs, **case.options), first[0], rtol=0, atol=1e-14)


@each_backend
def test_gradients_of_a_later_piece(backend: str) -> None:
    """With respect to its own tokens they are those of the whole."""
    inputs = whole(EVERYTHING)[0]
    first, second = slice(0, 17), slice(17, LENGTH)
    d_out = inputs.d_out.copy()
    d_out[:, first] = 0
    options = EVERYTHING.options
    expected = vq_oracle.vq_attention_gradients(*inputs[:5], d_out, **options, **optional(inputs))
    state = feed(backend, EVERYTHING, tokens(inputs, first), [17])[1]
    evaluate = differentiable(backend, tokens(inputs, second), **options, state=state)
    found = evaluate(d_out[:, second])[1]
    for name, target in expected._asdict().items():
        if name != "code_bias":
            target = target[:, second]
        assert_gradient_close(getattr(found, name), target, "float64")


def test_jax_no_gradient_through_a_state() -> None:
    inputs = whole(EVERYTHING)[0]
    first, second = tokens(inputs, slice(0, 17)), tokens(inputs, slice(17, 34))
    options = {**EVERYTHING.options, "return_state": True}

    def loss(v: jax.Array) -> jax.Array:
        _, state = with_values(first, v, **options)
        return jnp.sum(call("jax", second, **options, state=state)[0])

    def with_values(piece: Inputs, v: jax.Array, **options: Any) -> Any:
        arrays = [to_jax(x) for x in piece[:5]]
        extra = {name: to_jax(x) for name, x in optional(piece).items()}
        return jax_vq.vq_attention(*arrays[:2], v, *arrays[3:], **extra, **options)

    assert not np.any(jax.grad(loss)(to_jax(first.v)))


def test_torch_no_gradient_through_a_state() -> None:
    inputs = tokens(whole(EVERYTHING)[0], slice(0, 17))
    arrays = [dialect("torch")[1](x).requires_grad_() for x in inputs[:3]]
    books = [dialect("torch")[1](x) for x in inputs[3:5]]
    extra = {name: dialect("torch")[1](x) for name, x in optional(inputs).items()}
    out, state = torch_ref.vq_attention(*arrays, *books, **extra, **EVERYTHING.options, return_state=True)
    assert out.requires_grad
    assert not any(x.requires_grad for x in jax.tree.leaves(state))


@each_backend
def test_a_state_of_other_sizes_is_an_error(backend: str) -> None:
    inputs = tokens(whole(EVERYTHING)[0], slice(0, 3))
    wide = dialect(backend)[1](np.concatenate([inputs.codebook_k] * 2, axis=1))
    for changes in (
        {"batch": EVERYTHING.batch + 1},
        {"mem_len": EVERYTHING.mem_len + 1},
        {"n_sink": EVERYTHING.n_sink + 1},
        {"value_width": EVERYTHING.d_v + 1},
        {"local_width": LOCAL_WIDTH + 1},
        {"codebook_k": wide},
        {"codebook_k": wide[:1]},
    ):
        state = start_of(backend, EVERYTHING, inputs, **changes)
        with pytest.raises(ValueError, match="state"):
            call(backend, inputs, **EVERYTHING.options, state=state)
    case = STREAMS[0]
    inputs = tokens(whole(case)[0], slice(0, 3))
    with pytest.raises(ValueError, match=r"state.*is_causal"):
        call(backend, inputs, state=start_of(backend, case, inputs))


def test_jax_compiles_one_step_once() -> None:
    """A thousand tokens, one trace; the state moves in place."""
    case = Case(name="steps_1000", batch=1, q_len=1000, n_head=2, mem_len=16, n_sink=2, is_causal=True)
    inputs, expected = whole(case)
    books = [to_jax(x) for x in inputs[3:5]]
    traces = []

    @partial(jax.jit, donate_argnums=0)
    def step(state: Any, q: Any, k: Any, v: Any) -> Any:
        traces.append(1)
        out, state = jax_vq.vq_attention(q, k, v, *books, **case.options, state=state, return_state=True)
        return state, out

    state = start_of("jax", case, inputs)
    outs = []
    for t in range(case.q_len):
        before = state
        state, out = step(state, *(to_jax(x[:, t : t + 1]) for x in inputs[:3]))
        outs.append(out)
        assert all(x.is_deleted() for x in jax.tree.leaves(before) if x.size)
    assert len(traces) == 1
    assert_close(np.concatenate([to_numpy(x) for x in outs], axis=1), expected, "float64")


OPTIMIZED: dict[str, int | bool] = {"xla_backend_optimization_level": 3}
if "fusion_emitters" in fast_compile_flags():
    OPTIMIZED["xla_cpu_use_fusion_emitters"] = True


@each_backend
def test_a_million_tokens_in_pieces_and_whole(backend: str) -> None:
    """Float32 at width 64: the state carries counts and means over a million tokens; torch: a quarter."""
    length, width, n_piece = 1_000_000 if backend == "jax" else 250_000, 64, 4
    rng = np.random.default_rng(0)
    codebook = rng.normal(size=(1, 32, width))
    picked = rng.integers(32, size=(2, length))
    q, k = (codebook[0, p][None, :, None].astype(np.float32) for p in picked)
    v = rng.normal(size=(1, length, 1, width)).astype(np.float32)
    package, convert = dialect(backend)
    arrays = [convert(x, "float32") for x in (q, k, v)]
    books = [convert(codebook, "float32")] * 2
    attention = partial(package.vq_attention, is_causal=True, return_state=True)
    if backend == "jax":  # the unoptimised code that other tests compile would run five times as long
        attention = jax.jit(attention, compiler_options=OPTIMIZED)
    else:
        attention = partial(attention, block_len=64, mem_len=16, n_sink=4)
    with torch.inference_mode():
        whole = to_numpy(attention(*arrays, *books)[0])
        state, outs = None, []
        for i in range(n_piece):
            piece = slice(i * length // n_piece, (i + 1) * length // n_piece)
            out, state = attention(*(x[:, piece] for x in arrays), *books, state=state)
            outs.append(to_numpy(out))
    assert np.isfinite(whole).all()
    assert_close(np.concatenate(outs, axis=1), whole, "float32", limits=2)
