"""The kernels by Mosaic GPU: which shapes they take, that they lower, and on a GPU what they give.

Codes have the tests of `test_kernels`, which run with every kernel that finds them.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_vq
from jax_vq.kernels import (
    hopper,
    hopper_blocks,
    hopper_causal,
    hopper_causal_f32,
    hopper_codes,
    hopper_states,
    hopper_sums,
    hopper_window,
    quantize,
    sizes,
    tiles,
    vq_causal,
    vq_states,
    vq_sums,
)
from jax_vq.kernels.vq_tables import Tables
from jax_vq.ops import implementations
from jax_vq.ops.vq_blocks import Form, Keys
from jax_vq.ops.vq_causal import Books, Queries
from parity_tests.support import assert_close, assert_gradient_close, to_jax, to_numpy
from parity_tests.vq_calls import attend, differentiable, optional
from vq_common import vq_oracle
from vq_common.cases import Case, Inputs, case_inputs

ON_GPU = jax.default_backend() == "gpu"
on_gpu = pytest.mark.skipif(not ON_GPU, reason="kernels run there")


@pytest.fixture
def is_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels are lowered for a GPU, by whatever jax there is."""
    monkeypatch.setattr(tiles, "is_interpreted", lambda: False)
    monkeypatch.setattr(hopper, "is_usable", hopper.fits)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture(params=[1, 2])
def n_segment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    jax.clear_caches()
    monkeypatch.setattr(sizes, "n_segment", lambda length, n_row, tile: request.param)
    yield request.param
    jax.clear_caches()


def shape(length: int = 256, width: int = 128, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((2, length, 3, width), dtype)


@pytest.mark.usefixtures("is_compiled")
@pytest.mark.parametrize(
    "x, n_code, is_usable",
    [
        (shape(), 128, True),
        (shape(width=64), 512, True),
        (shape(length=264), 256, True),
        (shape(length=260), 128, False),
        (shape(length=56), 128, False),
        (shape(width=96), 128, False),
        (shape(width=256), 128, False),
        (shape(dtype=jnp.float32), 128, False),
        (shape(), 640, False),
        (shape(), 64, False),
    ],
)
def test_shapes_of_codes(x: Any, n_code: int, is_usable: bool) -> None:
    assert hopper_codes.is_usable(x, n_code) == is_usable


@pytest.mark.usefixtures("is_compiled")
@pytest.mark.parametrize(
    "vectors, n_code, segment_len, is_usable",
    [
        (shape(), 128, 256, True),
        (shape(length=136, width=64), 128, 128, True),
        (shape(length=120), 128, 128, False),
        (shape(length=257), 128, 128, False),
        (shape(), 128, 192, False),
        (shape(), 384, 256, True),
        (shape(), 64, 256, False),
        (shape(width=32), 128, 256, False),
        (shape(dtype=jnp.float32), 128, 256, False),
    ],
)
def test_shapes_of_sums(vectors: Any, n_code: int, segment_len: int, is_usable: bool) -> None:
    assert hopper_sums.is_usable(n_code, vectors, segment_len) == is_usable


@pytest.mark.usefixtures("is_compiled")
@pytest.mark.parametrize(
    "x, n_code, block, usable",
    [
        (shape(), 128, 128, {"causal", "states"}),
        (shape(length=136, width=64), 512, 128, {"states", "blocks"}),
        (shape(), 384, 128, {"states", "blocks"}),
        (shape(), 512, 256, {"states"}),
        (shape(), 640, 128, {"states"}),
        (shape(), 64, 128, set()),
        (shape(), 512, 192, set()),
        (shape(length=257), 512, 128, set()),
        (shape(width=32), 128, 128, set()),
        (shape(dtype=jnp.float32), 128, 128, set()),
    ],
)
def test_shapes_of_attention(x: Any, n_code: int, block: int, usable: set[str]) -> None:
    codes, weight = jnp.zeros(x.shape[:3], jnp.int32), jax.ShapeDtypeStruct((3, 100, n_code), x.dtype)
    found = {
        "causal": hopper_causal.is_usable(codes, x, weight, block),
        "states": hopper_states.is_usable(n_code, x, block),
        "blocks": hopper_blocks.is_usable(codes, x, weight, block),
    }
    assert {name for name, is_usable in found.items() if is_usable} == usable


@pytest.mark.usefixtures("is_compiled")
@pytest.mark.parametrize(
    "v, n_code, segment_len, is_usable",
    [
        (shape(dtype=jnp.float32), 128, 64, True),
        (shape(length=136, width=512, dtype=jnp.float32), 128, 128, True),
        (shape(length=260, dtype=jnp.float32), 128, 64, False),
        (shape(width=64, dtype=jnp.float32), 128, 64, False),
        (shape(width=192, dtype=jnp.float32), 128, 64, False),
        (shape(dtype=jnp.float32), 64, 64, False),
        (shape(dtype=jnp.float32), 128, 96, False),
        (shape(), 128, 128, False),
    ],
)
def test_shapes_of_float32_attention(v: Any, n_code: int, segment_len: int, is_usable: bool) -> None:
    codes = jnp.zeros(v.shape[:3], jnp.int32)
    weight = jax.ShapeDtypeStruct((9, 100, n_code), jnp.bfloat16)
    assert hopper_causal_f32.is_usable(codes, v, weight, segment_len) == is_usable
    other = jnp.zeros((2, v.shape[1] + 64, 3), jnp.int32)
    assert not hopper_causal_f32.is_usable(other, v, weight, segment_len)


@pytest.mark.usefixtures("is_compiled")
@pytest.mark.parametrize(
    "q, v, n_code, form, is_usable",
    [
        (shape(), shape(), 512, Form(0.1, 512, 512, 4), True),
        (shape(length=136), shape(length=136), 128, Form(0.1, 128, 384, 64), True),
        (shape(width=64), shape(), 384, Form(0.1, 384, 128), True),
        (shape(), shape(), 512, Form(0.1, 512, 64, 4), False),
        (shape(), shape(), 512, Form(0.1, 192, 128, 4), False),
        (shape(), shape(), 512, Form(0.1, 512, 512, 65), False),
        (shape(), shape(), 512, Form(-0.1, 512, 512, 4), False),
        (shape(), shape(), 640, Form(0.1, 512, 512, 4), False),
        (shape(), shape(), 64, Form(0.1, 512, 512, 4), False),
        (shape(length=120), shape(length=120), 128, Form(0.1, 128, 128), False),
        (shape(length=260), shape(length=260), 128, Form(0.1, 128, 128), False),
        (shape(width=96), shape(), 128, Form(0.1, 128, 128), False),
        (shape(), shape(width=96), 128, Form(0.1, 128, 128), False),
        (shape(dtype=jnp.float32), shape(), 128, Form(0.1, 128, 128), False),
    ],
)
def test_shapes_of_a_window(q: Any, v: Any, n_code: int, form: Form, is_usable: bool) -> None:
    codes, weight = jnp.zeros(v.shape[:3], jnp.int32), jax.ShapeDtypeStruct((3, 100, n_code), jnp.bfloat16)
    queries, keys = Queries(q, codes, q), Keys(codes, v, q, None)
    assert hopper_window.is_usable(queries, keys, weight, form) == is_usable


def test_triton_alone_runs_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, and no longer than that call."""
    seen = []

    def kernel(asked: str | None) -> None:
        monkeypatch.setitem(
            implementations._KERNELS, "probe", lambda: implementations.Kernel(look, lambda *_: None)
        )
        implementations.run(asked, "probe", lambda: None)

    def look() -> int:
        seen.append(implementations.is_asked_for("triton"))
        return 0

    monkeypatch.setattr(implementations, "why_not_here", lambda asked: None)
    kernel("triton")
    assert not implementations.is_asked_for("triton")
    kernel(None)
    assert seen[0]
    assert not seen[-1]
    assert not implementations.is_asked_for("triton")


def test_kernels_of_mosaic_run_with_the_jax_that_they_were_tested_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hopper, "is_interpreted", lambda: False)
    monkeypatch.setattr(hopper, "VERSION", jax.__version_info__[:2])
    assert hopper.is_usable(256, 128)
    monkeypatch.setattr(hopper, "VERSION", (0, 0))
    assert not hopper.is_usable(256, 128)


def test_no_kernel_of_mosaic_is_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "VERSION", jax.__version_info__[:2])
    assert hopper.is_usable(256, 128) == ON_GPU
    monkeypatch.undo()
    assert hopper.fits(256, 128)
    assert hopper.is_usable(256, 128) == (ON_GPU and jax.__version_info__[:2] == hopper.VERSION)


@pytest.mark.usefixtures("is_compiled")
@pytest.mark.parametrize(
    "dtype, n_code, options, n_kernel",
    [
        ("bfloat16", 128, {"is_causal": True}, 4),
        ("bfloat16", 128, {"is_causal": False}, 3),
        ("bfloat16", 512, {"is_causal": True}, 5),
        ("bfloat16", 512, {"is_causal": True, "block_len": 128, "mem_len": 128, "n_sink": 4}, 5),
        ("float32", 128, {"is_causal": True}, 1),
    ],
)
def test_kernels_lower_for_a_gpu(
    dtype: str, n_code: int, options: dict[str, Any], n_kernel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if jax.__version_info__ >= (0, 11) and not ON_GPU:
        pytest.skip("this jax lowers for a GPU that is there, or named")
    monkeypatch.setattr(quantize, "BRIEF", 0)
    monkeypatch.setattr(implementations, "why_not_here", lambda asked: None)
    x, book = shape(dtype=dtype), jax.ShapeDtypeStruct((3, n_code, 128), jnp.float32)
    call = jax.jit(lambda *arrays: jax_vq.vq_attention(*arrays, **options))
    text = call.trace(x, x, x, book, book).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == n_kernel
    twice = [jax.ShapeDtypeStruct((2, *array.shape), array.dtype) for array in (x, x, x, book, book)]
    text = jax.jit(jax.vmap(call)).trace(*twice).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == n_kernel


def inputs_of(dtype: str = "bfloat16", **sizes: Any) -> Inputs:
    return case_inputs(Case(name="hopper", **{"batch": 2, "is_causal": True} | sizes), dtype)


def arguments_of(
    n_code: int,
    length: int,
    dtype: str = "bfloat16",
    *,
    batch: int = 2,
    width: int = 128,
    spread: float = 1.0,
) -> tuple[jax.Array, Keys, Tables, vq_sums.Sums]:
    """Queries without a code and keys outside the table, with sums before."""
    rng = np.random.default_rng(0)
    n_head, n_key_head, n_padded = 4, 2, vq_sums.padded_codes(n_code)[0]
    query = rng.integers(0, n_code, (batch, length, n_head)).astype(np.int32)
    key = rng.integers(0, n_code + 20, (batch, length, n_key_head)).astype(np.int32)
    query[0, 7, 3] = query[-1, -1, 0] = -1
    value = rng.normal(size=(batch, length, n_key_head, width))
    books = [rng.normal(size=(n, n_code, 16)) for n in (n_head, n_key_head)]
    books[0][1] *= spread
    tables = Tables.of(
        Books.of(*(to_jax(x, "float32") for x in books), None, 0.5), n_padded, jnp.dtype(dtype)
    )
    shape = batch, n_key_head, 1, n_padded
    sums = rng.normal(size=(*shape, width)), rng.integers(1, 9, shape).astype(float)
    first = vq_sums.Sums(*(to_jax(x, "float32") for x in sums))
    return jnp.asarray(query), Keys(jnp.asarray(key), to_jax(value, dtype), None, None), tables, first


def with_local(inputs: Inputs) -> Inputs:
    """Vectors of exact scores that are not q and k, of their width."""
    rng = np.random.default_rng(1)
    local = (to_numpy(to_jax(rng.normal(size=x.shape), "bfloat16")) for x in (inputs.q, inputs.k))
    return inputs._replace(**dict(zip(("q_local", "k_local"), local, strict=True)))


@pytest.mark.parametrize("n_number", [20, 2**23])  # with many that tie, and few
@pytest.mark.parametrize("n_code", [128, 512])
def test_the_best_two_are_those_of_a_sort(n_code: int, n_number: int) -> None:
    """Of every eighth code, on both sides of the middle; the code of the best where it is alone."""
    rng = np.random.default_rng(n_code)
    floor, shape = np.float32(2.0**9).view(np.int32), (40, n_code)
    number = rng.integers((2**23 - n_number) // 2, (2**23 + n_number) // 2, shape, dtype=np.int32)
    shift, low = jnp.int32(2**hopper_codes.N_BIT), jnp.full((40, 8), floor)
    known = hopper_codes.Known.none(low, jnp.full((40, 8), hopper_codes.LEAST))
    for k in range(0, n_code, 128):
        known = known.merged(jnp.asarray(floor + number[:, k : k + 128]), k, low, shift)
    best, second = (to_numpy(x) for x in known.best_two(shift))
    by_lane = np.swapaxes(number.reshape(40, n_code // 8, 8), 1, 2)
    ranked = np.sort(by_lane, axis=-1)
    middle = 2**22
    np.testing.assert_array_equal((best >> hopper_codes.N_BIT) + middle, ranked[..., -1])
    np.testing.assert_array_equal((second >> hopper_codes.N_BIT) + middle, ranked[..., -2])
    is_alone = ranked[..., -1] > ranked[..., -2]
    assert is_alone.any()
    code = (best & (2**hopper_codes.N_BIT - 1))[is_alone]
    np.testing.assert_array_equal(code, 8 * np.argmax(by_lane, axis=-1)[is_alone])


@pytest.mark.parametrize("length, n_code", [(128, 64), (136, 384), (256, 1024)])
def test_codes_by_chunk_are_told_apart(length: int, n_code: int) -> None:
    """Each as its row of one chunk, others and tokens outside as none."""
    codes = np.random.default_rng(0).integers(-2, n_code + 300, (2, length, 3)).astype(np.int32)
    codes[1, :4, 2] = -1, 0, n_code - 1, n_code
    found = to_numpy(hopper_states.by_chunk(jnp.asarray(codes), n_code))
    n_token = -(-length // hopper_states.TILE) * hopper_states.TILE
    assert found.shape == (2, 3, -(-n_code // hopper_states.CHUNK), n_token)
    rows = np.arange(hopper_states.CHUNK)
    hot = np.moveaxis(found[..., None] == rows, 2, 3).reshape(2, 3, n_token, -1)[..., :n_code]
    expected = np.zeros(hot.shape, bool)
    expected[:, :, :length] = np.swapaxes(codes, 1, 2)[..., None] == np.arange(n_code)
    np.testing.assert_array_equal(hot, expected)


@on_gpu
@pytest.mark.parametrize("length, segment_len", [(128, 128), (136, 128), (1000, 384), (4096, 1024)])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("n_code", [100, 300, 512])
def test_sums_are_those_of_triton(
    length: int, segment_len: int, width: int, n_code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, n_code, (2, length, 3)).astype(np.int32)
    codes[1, length - 1, 2] = -1  # a key that is not finite
    vectors = rng.normal(size=(2, length, 3, width))
    vectors[0, 3, 1, 5] = np.inf
    arrays = jnp.asarray(codes), to_jax(vectors, "bfloat16")
    assert hopper_sums.is_usable(vq_sums.padded_codes(n_code)[0], arrays[1], segment_len)
    found = vq_sums.segment_sums(*arrays, n_code, segment_len)
    monkeypatch.setattr(hopper, "is_usable", lambda length, width: False)
    expected = vq_sums.segment_sums(*arrays, n_code, segment_len)
    np.testing.assert_array_equal(found.numbers, expected.numbers)
    np.testing.assert_allclose(found.vectors, expected.vectors, rtol=1e-5, atol=1e-4)


@on_gpu
@pytest.mark.usefixtures("n_segment")
@pytest.mark.parametrize("length, block", [(128, 128), (136, 128), (1000, 128), (1000, 256), (2048, 384)])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("n_code", [128, 384, 512])
def test_states_are_those_of_triton(
    length: int, block: int, width: int, n_code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, as sums of whole numbers are; also codes outside and a key that is not finite."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-3, n_code + 2, (2, length, 3)).astype(np.int32)
    codes[codes == -1] = 0
    codes[1, length // 2, 2] = -1
    arrays = jnp.asarray(codes), to_jax(rng.integers(-9, 10, (2, length, 3, width)).astype(float), "bfloat16")
    first = vq_sums.Sums(
        jnp.asarray(rng.integers(-9, 10, (2, 3, 1, n_code, width)), jnp.float32),
        jnp.asarray(rng.integers(0, 10, (2, 3, 1, n_code)), jnp.float32),
    )
    assert hopper_states.is_usable(n_code, arrays[1], block)
    found = vq_states.block_states(*arrays, first, block)
    monkeypatch.setattr(hopper, "is_usable", lambda length, width: False)
    expected = vq_states.block_states(*arrays, first, block)
    n_block = -(-length // block)  # others, behind the end, are as they are
    for x, y in zip(found[0], expected[0], strict=True):
        np.testing.assert_array_equal(to_numpy(x[:, :, :n_block]), to_numpy(y[:, :, :n_block]))
    for x, y in zip(found[1], expected[1], strict=True):
        np.testing.assert_array_equal(x, y)


@on_gpu
@pytest.mark.usefixtures("n_segment")
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("n_code", [100, 128, 300])
@pytest.mark.parametrize("length, width", [(128, 128), (136, 64), (1000, 128), (1000, 64)])
def test_attention_matches_the_oracle(
    length: int, width: int, n_code: int, is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several heads that share keys, tiles that are cut short, and every gradient."""
    monkeypatch.setattr(quantize, "BRIEF", 0)
    heads = {"n_head": 4, "n_kv_head": 2}
    codes = {"n_code_q": n_code, "n_code_k": n_code}
    inputs = inputs_of(q_len=length, d_k=width, d_v=width, is_causal=is_causal, **heads, **codes)
    options: dict[str, Any] = {"is_causal": is_causal} | optional(inputs)
    out, gradients = differentiable("jax", inputs, "bfloat16", is_causal=is_causal)(inputs.d_out)
    assert_close(out, vq_oracle.vq_attention(*inputs[:5], **options), "bfloat16")
    targets = vq_oracle.vq_attention_gradients(*inputs[:5], inputs.d_out, **options)
    for found, target in zip(gradients, targets, strict=True):
        if target is not None:
            assert_gradient_close(found, target, "bfloat16")


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The shapes of values of the calls that `hopper_window` ran."""
    seen, run = [], hopper_window.window_attention

    def look(queries: Queries, keys: Keys, *rest: Any) -> Any:
        seen.append(keys.v.shape)
        return run(queries, keys, *rest)

    jax.clear_caches()  # what an earlier test compiled would run unseen
    monkeypatch.setattr(hopper_window, "window_attention", look)
    yield seen
    jax.clear_caches()


@on_gpu
@pytest.mark.parametrize(
    "length, widths, n_code, window",
    [
        (1160, (128, 128), 500, {"block_len": 512, "mem_len": 512, "n_sink": 4}),
        (1160, (128, 128), 500, {"block_len": 512, "mem_len": 512, "n_sink": 0}),
        (1000, (64, 64), 128, {"block_len": 256, "mem_len": 128, "n_sink": 4}),
        (1000, (64, 128), 300, {"block_len": 384, "mem_len": 128, "n_sink": 64}),
        (904, (128, 64), 100, {"block_len": 128, "mem_len": 384, "n_sink": 0}),
        (128, (128, 128), 128, {"block_len": 128, "mem_len": 128, "n_sink": 4}),
    ],
)
def test_windows_match_the_oracle(
    length: int, widths: tuple[int, int], n_code: int, window: dict[str, Any], windows: list[Any]
) -> None:
    """Heads that share keys, last tiles that are cut short, and the gradients that follow."""
    heads, codes = {"n_head": 4, "n_kv_head": 2}, {"n_code_q": n_code, "n_code_k": n_code}
    inputs = with_local(inputs_of(q_len=length, d_k=widths[0], d_v=widths[1], **heads, **codes))
    options: dict[str, Any] = {"is_causal": True, **window}
    out, gradients = differentiable("jax", inputs, "bfloat16", **options)(inputs.d_out)
    assert windows
    options |= optional(inputs)
    assert_close(out, vq_oracle.vq_attention(*inputs[:5], **options), "bfloat16")
    targets = vq_oracle.vq_attention_gradients(*inputs[:5], inputs.d_out, **options)
    for found, target in zip(gradients, targets, strict=True):
        if target is not None:
            assert_gradient_close(found, target, "bfloat16")


@on_gpu
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name, token, last",
    [
        ("q_local", 300, 301),
        ("k_local", 2, 1032),  # a sink
        ("k_local", 300, 640),  # seen by its block and the next two, then through its code
        ("k_local", 1031, 1032),
    ],
)
def test_what_is_not_finite_stays_in_its_window(
    name: str, token: int, last: int, value: float, windows: list[Any]
) -> None:
    window: dict[str, Any] = {"block_len": 128, "mem_len": 256, "n_sink": 4}
    inputs = with_local(inputs_of(q_len=1032, d_k=128, d_v=128, n_head=2, n_code_q=128, n_code_k=128))
    clean = attend("jax", inputs, "bfloat16", is_causal=True, **window)
    x = getattr(inputs, name).copy()
    x[1, token, 1, 2] = value
    out = attend("jax", inputs._replace(**{name: x}), "bfloat16", is_causal=True, **window)
    assert windows
    rows = np.zeros(out.shape, bool)
    rows[1, token:last, 1] = True
    np.testing.assert_array_equal(np.isnan(out), rows)
    np.testing.assert_array_equal(out[~rows], clean[~rows])


@on_gpu
@pytest.mark.usefixtures("n_segment")
@pytest.mark.parametrize("n_code", [100, 128])
@pytest.mark.parametrize("length, width", [(128, 128), (200, 512), (1000, 128)])
def test_float32_attention_matches_the_oracle(length: int, width: int, n_code: int) -> None:
    """Several heads that share keys, and tiles that are cut short."""
    heads, codes = {"n_head": 4, "n_kv_head": 2}, {"n_code_q": n_code, "n_code_k": n_code}
    inputs = inputs_of("float32", q_len=length, d_k=16, d_v=width, **heads, **codes)
    arrays, options = [to_jax(x, "float32") for x in inputs[:5]], {"is_causal": True} | optional(inputs)
    assert "mosaic_gpu" in implementations.what_runs(jax_vq.vq_attention, *arrays, **options)
    found = to_numpy(jax_vq.vq_attention(*arrays, **options))
    assert_close(found, vq_oracle.vq_attention(*inputs[:5], **options), "float32")


@on_gpu
@pytest.mark.usefixtures("n_segment")
def test_float32_attention_is_that_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where codes are missing or not in the table, and a value is not finite; with sums before, and lse."""
    query, keys, *rest = arguments_of(120, 1000, "float32", width=256)
    keys = keys._replace(v=keys.v.at[1, 700, 1, 5].set(jnp.nan))
    results = []
    for fits in (hopper.fits, lambda length, width: False):
        monkeypatch.setattr(hopper, "is_usable", fits)
        results.append(vq_causal._by_segments(query, keys, *rest)[:2])
    for found, expected in zip(*results, strict=True):
        found, expected = to_numpy(found), to_numpy(expected)
        assert not np.isnan(expected).all()
        np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
        assert_close(np.nan_to_num(found), np.nan_to_num(expected), "float32", limits=2)


@on_gpu
def test_what_is_not_finite_stays_where_it_is() -> None:
    """NaN in the rows that see it and in no other, of queries, keys and values."""
    inputs = inputs_of(q_len=520, d_k=128, d_v=128, n_head=2, n_code_q=128, n_code_k=128)
    expected = vq_oracle.vq_attention(*inputs[:5], is_causal=True)
    q, k, v, *books = (np.array(x) for x in inputs[:5])
    q[0, 7, 1, 3], k[0, 300, 0, 5], v[1, 400, 1, 64] = np.nan, np.inf, np.nan
    rows = np.zeros(expected.shape, bool)
    rows[0, 7, 1] = rows[0, 300:, 0] = rows[1, 400:, 1, 64] = True
    arrays = [to_jax(x, "bfloat16") for x in (q, k, v)] + [to_jax(x, "float32") for x in books]
    found = to_numpy(jax_vq.vq_attention(*arrays, is_causal=True))
    np.testing.assert_array_equal(np.isnan(found), rows)
    assert_close(found[~rows], expected[~rows], "bfloat16")


@on_gpu
@pytest.mark.parametrize("n_code", [128, 300])
def test_calls_are_mapped(n_code: int) -> None:
    """`jax.vmap` of a call with kernels by Mosaic."""
    inputs = inputs_of(q_len=256, d_k=64, d_v=64, n_head=2, n_code_q=n_code, n_code_k=n_code)
    q, k, v = (to_jax(x, "bfloat16") for x in inputs[:3])
    books = [to_jax(x, "float32") for x in inputs[3:5]]

    def call(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax_vq.vq_attention(q[None], k[None], v[None], *books, is_causal=True)[0]

    together = jax_vq.vq_attention(q, k, v, *books, is_causal=True)
    np.testing.assert_array_equal(to_numpy(jax.vmap(call)(q, k, v)), to_numpy(together))


def test_what_runs_is_named() -> None:
    arrays = shape(), shape(), shape(), *(jax.ShapeDtypeStruct((3, 128, 128), jnp.float32),) * 2

    def names(implementation: str | None) -> set[str]:
        options = {"is_causal": True, "implementation": implementation}
        return implementations.what_runs(jax_vq.vq_attention, *arrays, **options)

    assert names("xla") == {"xla"}
    assert names("triton") == {"triton"}
    assert names(None) == ({"triton", "mosaic_gpu"} if ON_GPU else {"xla"})
