"""Bad inputs of every op and the errors they get, as one table."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

B, T, S, H, D, V, C, P, N = 2, 9, 7, 3, 5, 4, 6, 4, 8


def f32(*shape: int) -> np.ndarray:
    return np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)


def i32(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.int32)


def last(array: np.ndarray, value: float) -> np.ndarray:
    """`array` with `value` as its last entry."""
    array = array.copy()
    array[(-1,) * array.ndim] = value
    return array


QKV = {"q": f32(B, T, H, D), "k": f32(B, S, H, D), "v": f32(B, S, H, V)}
X, OUT, LSE = f32(B, T, H, D), f32(B, T, H, V), f32(B, T, H)
DRAWS, DIRECTIONS = f32(H, C) ** 2 / 2, f32(H, P, D)
VALID: dict[str, dict[str, Any]] = {
    "nearest_codes": {"x": X, "codebook": f32(H, C, D)},
    "take_codes": {"codebook": f32(H, C, D), "codes": i32(B, T, H)},
    "straight_through": {"x": X, "quantized": X},
    "commitment_loss": {"x": X, "quantized": X},
    "vq_attention": {**QKV, "codebook_q": f32(H, C, D), "codebook_k": f32(H, C + 1, D)},
    "dot_product_attention": QKV,
    "merge_attention": {"out1": OUT, "lse1": LSE, "out2": OUT, "lse2": LSE},
    "angular_hash": {"x": X, "directions": DIRECTIONS},
    "gray_code": {"index": i32(2)},
    "gray_rank": {"word": i32(2)},
    "hyper_attention": {**QKV, "directions": DIRECTIONS, "sample_ids": i32(B, 1, N, H)},
    "kmeans": {"x": X, "draws": DRAWS},
    # The state comes as its two parts.
    "ema_update": {"count": DRAWS, "sum": f32(H, C, D), "x": X, "codes": i32(B, T, H), "draws": DRAWS},
}
ATTENTION = ("vq_attention", "dot_product_attention", "hyper_attention")
MASKED = (*ATTENTION, "commitment_loss", "kmeans", "ema_update")
# op, its book of vectors, what the book is for
BOOKS = (
    ("nearest_codes", "codebook", "x"),
    ("vq_attention", "codebook_q", "q"),
    ("vq_attention", "codebook_k", "k"),
    ("angular_hash", "directions", "x"),
    ("hyper_attention", "directions", "q"),
)
NAN, INF = float("nan"), float("inf")


class Bad(NamedTuple):
    """A call of `op` with some arguments changed, and its error."""

    op: str
    error: type[Exception]
    message: str  # a part of it; … stands for anything
    changes: dict[str, Any]
    is_value: bool = False  # about values, which cannot be looked at while JAX traces


def wrong(op: str, message: str, **changes: Any) -> Bad:
    return Bad(op, ValueError, message, changes)


def mistyped(op: str, message: str, **changes: Any) -> Bad:
    return Bad(op, TypeError, message, changes)


def wrong_value(op: str, message: str, **changes: Any) -> Bad:
    return Bad(op, ValueError, message, changes, is_value=True)


def shapes_of_attention(op: str) -> Iterator[Bad]:
    yield wrong(op, "q must have 4 axes, found shape (2, 9, 5)", q=f32(B, T, D))
    yield wrong(op, "v must have 4 axes, found shape (2, 7, 3, 4, 1)", v=f32(B, S, H, V, 1))
    # Attention over codes takes key heads that divide the query heads.
    n_key_head = 2 if op == "vq_attention" else 1
    for k in ((B + 1, S, H, D), (1, S, H, D), (B, S, H + 1, D), (B, S, n_key_head, D), (B, S, H, D + 1)):
        yield wrong(op, f"k must …, found q (2, 9, 3, 5) and k {k}", k=f32(*k))
    for v in ((B + 1, S, H, V), (B, T, H, V), (B, S, 1, V)):
        yield wrong(op, f"v must match k …, found k (2, 7, 3, 5) and v {v}", v=f32(*v))
    yield wrong(op, "k must be as long as q …, found q (2, 9, 3, 5) and k (2, 7, 3, 5)", is_causal=True)
    for name, empty in (("q", (B, 0, H, D)), ("k", (0, S, H, D)), ("v", (B, S, H, 0))):
        yield wrong(op, f"{name} must not be empty, found shape {empty}", **{name: f32(*empty)})


def shapes_of_masks(op: str) -> Iterator[Bad]:
    name = "k" if op in ATTENTION else "x"
    shape = VALID[op][name].shape
    for mask in ((B, shape[1] + 1), (1, shape[1]), (shape[1], B)):
        yield wrong(op, f"mask must be …, found mask {mask} and {name} {shape}", mask=np.ones(mask, bool))
    yield wrong(op, f"mask must have 2 axes, found shape ({shape[1]},)", mask=np.ones(shape[1], bool))


def shapes_of_books(op: str, name: str, of: str) -> Iterator[Bad]:
    for book in ((H + 1, C, D), (1, C, D), (H, C, D + 1), (H, C, 1)):
        found = f"found {name} {book} and {of} {VALID[op][of].shape}"
        yield wrong(op, f"{name} must be …, {found}", **{name: f32(*book)})
    yield wrong(op, f"{name} must have 3 axes, found shape (3, 5)", **{name: f32(H, D)})
    yield wrong(op, f"{name} must not be empty, found shape (3, 0, 5)", **{name: f32(H, 0, D)})


def other_shapes() -> Iterator[Bad]:
    yield wrong("nearest_codes", "x must have 4 axes, found shape (9, 3, 5)", x=f32(T, H, D))
    for codes in ((B, T, H + 1), (B, T, 1)):
        found = f"found codes {codes} and"
        yield wrong("take_codes", f"codes must be …, {found} codebook (3, 6, 5)", codes=i32(*codes))
        yield wrong("ema_update", f"codes must be …, {found} x (2, 9, 3, 5)", codes=i32(*codes))
    yield wrong("take_codes", "codes must have 3 axes, found shape (2, 9)", codes=i32(B, T))
    for quantized in ((B, T, H, 1), (1, T, H, D)):
        for op in ("straight_through", "commitment_loss"):
            found = f"found {quantized} and (2, 9, 3, 5)"
            yield wrong(op, f"quantized must have the shape of x, {found}", quantized=f32(*quantized))
    found = "found (2, 9, 3, 5) and (2, 9, 3, 4)"
    yield wrong("merge_attention", f"out2 must have the shape of out1, {found}", out2=X)
    for lse in ((B, H, T), (B, T, 1)):
        yield wrong("merge_attention", f"lse1 must be …, found {lse} and (2, 9, 3, 4)", lse1=f32(*lse))
    yield wrong("merge_attention", "lse2 must have 3 axes, found shape (2, 9, 3, 4)", lse2=OUT)
    yield wrong("merge_attention", "out1 must have 4 axes, found shape (2, 9, 3)", out1=LSE)
    yield wrong("angular_hash", "directions must hold 1 to 30 …, found (3, 31, 5)", directions=f32(H, 31, D))
    for ids in ((B + 1, 1, N, H), (B, 2, N, H), (B, 1, N, 1)):
        message = f"sample_ids must be … R = 1, found sample_ids {ids} and k (2, 7, 3, 5)"
        yield wrong("hyper_attention", message, sample_ids=i32(*ids))
    yield wrong(
        "hyper_attention", "sample_ids must have 4 axes, found shape (2, 8, 3)", sample_ids=i32(B, N, H)
    )
    yield wrong("kmeans", "draws must be …, found draws (4, 6) and x (2, 9, 3, 5)", draws=f32(H + 1, C))
    yield wrong("kmeans", "draws must have 2 axes, found shape (6,)", draws=f32(C))
    yield wrong("ema_update", "draws must be …, found draws (3, 7) and count (3, 6)", draws=f32(H, C + 1))
    for total in ((H, C, D + 1), (H, C + 1, D)):
        message = f"state must be … of x, found sum {total} and x (2, 9, 3, 5)"
        yield wrong("ema_update", message, sum=f32(*total))
    yield wrong("ema_update", "state.count must have 2 axes, found shape (6,)", count=f32(C))


def of_vq_attention() -> Iterator[Bad]:
    """Window, sinks, local vectors, documents and streaming."""
    wrong_here = partial(wrong, "vq_attention")
    mistyped_here = partial(mistyped, "vq_attention")
    square: dict[str, Any] = {"k": X, "v": OUT, "is_causal": True}
    for name in ("mem_len", "n_sink"):
        yield wrong_here(f"{name} …is_causal", **square | {"is_causal": False, name: 1})
        for value in (-1, -5):
            yield wrong_here(f"{name} must be an int >= 0, found {value}", **square, **{name: value})
        for other in (True, 1.5, 2.0, "8", None):
            yield mistyped_here(f"{name} must be an int >= 0, found {other!r} (", **square, **{name: other})
    yield wrong_here("return_state …is_causal", return_state=True)

    local: dict[str, np.ndarray] = {"q_local": f32(B, T, H, 6), "k_local": f32(B, T, H, 6)}
    for name, shape in (
        ("q_local", (B + 1, T, H, 6)),
        ("q_local", (B, T - 1, H, 6)),
        ("q_local", (B, T, 1, 6)),
        ("k_local", (1, T, H, 6)),
        ("k_local", (B, T + 1, H, 6)),
        ("k_local", (B, T, H + 1, 6)),
    ):
        message = f"{name} must …{shape}…(2, 9, 3, 5)"
        yield wrong_here(message, **square | local | {name: f32(*shape)})
    message = "k_local must …(2, 9, 3, 7) and …(2, 9, 3, 6)"
    yield wrong_here(message, **square | local | {"k_local": f32(B, T, H, 7)})
    for name, array in local.items():
        both = square | local
        yield wrong_here(f"{name} must have 4 axes, found shape (9, 3, 6)", **both | {name: array[0]})
        for dtype, message in (("float64", "have the dtype of …"), ("int32", "be one of …")):
            yield mistyped_here(f"{name} must {message}…{dtype}", **both | {name: array.astype(dtype)})
        yield mistyped_here(f"{name} must be a…, found list", **both | {name: array.tolist()})

    for shape in ((H + 1,), (1,)):
        yield wrong_here(f"code_bias must …{shape}…(2, 9, 3, 5)", code_bias=f32(*shape))
    yield wrong_here("code_bias must have 1 axes, found shape (3, 1)", code_bias=f32(H, 1))
    yield mistyped_here("code_bias must be one of …", code_bias=i32(H))
    yield mistyped_here("code_bias must be a…, found list", code_bias=[0.0] * H)

    for shape in ((B, T + 1), (1, T), (T, B)):
        yield wrong_here(f"segment_ids must …{shape}…(2, 9, 3, 5)", **square, segment_ids=i32(*shape))
    yield wrong_here("segment_ids must have 2 axes, found shape (9,)", **square, segment_ids=i32(T))
    for dtype in ("float32", "bool"):
        ids = np.zeros((B, T), dtype)
        yield mistyped_here(f"segment_ids must be integers, found …{dtype}", **square, segment_ids=ids)
    yield mistyped_here("segment_ids must be a…, found list", **square, segment_ids=[[0] * T] * B)
    # Documents are of one sequence: as many keys as queries.
    yield wrong_here("segment_ids …(2, 9, 3, 5)…(2, 7, 3, 5)", segment_ids=i32(B, T))


def types() -> Iterator[Bad]:
    """Lists, integers for floats and the other way round, half types for others."""
    integers = {"codes", "sample_ids", "index", "word"}
    for op, arguments in VALID.items():
        for name, value in arguments.items():
            shown = f"state.{name}" if name in ("count", "sum") else name
            yield mistyped(op, f"{shown} must be a…, found list", **{name: value.tolist()})
            allowed = "integers, found …" if name in integers else "one of …, found …"
            for dtype in ("float32", "bool") if name in integers else ("int32", "bool", "complex64"):
                yield mistyped(op, f"{shown} must be {allowed}{dtype}", **{name: value.astype(dtype)})
    for op in ATTENTION:
        message = "k must have the dtype of q, found q …float32 and k …float64"
        yield mistyped(op, message, k=QKV["k"].astype("float64"))
        message = "v must have the dtype of q, found q …float32 and v …float16"
        yield mistyped(op, message, v=QKV["v"].astype("float16"))
    for op in MASKED:
        yield mistyped(op, "mask must be a…, found list", mask=[[True]])
        for dtype in ("int32", "float32", "uint8"):
            mask = np.ones((B, S if op in ATTENTION else T), dtype)
            yield mistyped(op, f"mask must be boolean …, found …{dtype}", mask=mask)
    for op, name, of in BOOKS:
        message = f"{name} must have the dtype of {of} or float32, found …float16 for …float32"
        yield mistyped(op, message, **{name: VALID[op][name].astype("float16")})
    for op, name, other in (
        ("straight_through", "quantized", "x"),
        ("commitment_loss", "quantized", "x"),
        ("merge_attention", "out2", "out1"),
        ("merge_attention", "lse2", "lse1"),
        ("ema_update", "sum", "count"),
    ):
        message = f"{name} must have the dtype of …{other}, found …float64 and …float32"
        yield mistyped(op, message, **{name: VALID[op][name].astype("float64")})
    yield mistyped("vq_attention", "codebook_k must be a…, found NoneType", codebook_k=None)


def numbers() -> Iterator[Bad]:
    for op, name, low in (
        ("vq_attention", "block_len", 1),
        ("hyper_attention", "block_size", 1),
        ("hyper_attention", "min_seq_len", 1),
        ("kmeans", "n_iter", 0),
    ):
        for value in (low - 1, -5):
            yield wrong(op, f"{name} must be an int >= {low}, found {value}", **{name: value})
        for value in (True, 1.5, 2.0, "8", None):
            yield mistyped(op, f"{name} must be an int >= {low}, found {value!r} (", **{name: value})
    for op in ATTENTION:
        for scale in (NAN, INF, -INF):
            yield wrong(op, f"scale must be finite, found {scale}", scale=scale)
        for kind, scale in (("bool", True), ("str", "1"), ("complex", 1j), ("", f32(1))):
            yield mistyped(op, f"scale must be a Python number or None, found {kind}", scale=scale)
        for kind, flag in (("int", 1), ("str", "yes"), ("NoneType", None)):
            yield mistyped(op, f"is_causal must be True or False, found {kind}", is_causal=flag)
    for name, allowed, values in (
        ("decay", "[0, 1]", (-0.1, 1.1, NAN)),
        ("threshold", "[0, inf]", (-1.0, NAN)),
    ):
        for number in values:
            message = f"{name} must lie in {allowed}, found {number}"
            yield wrong("ema_update", message, **{name: number})
        for text in ("0.9", True, None):
            yield mistyped("ema_update", f"{name} must be a number, found {text!r} (", **{name: text})


def values() -> Iterator[Bad]:
    for op, name, _ in BOOKS:
        book = VALID[op][name]
        for value in (NAN, INF, -INF):
            yield wrong_value(op, f"{name} {book.shape} holds NaN or inf", **{name: last(book, value)})
    for op, name, size in (
        ("take_codes", "codes", C),
        ("ema_update", "codes", C),
        ("hyper_attention", "sample_ids", S),
    ):
        ids = VALID[op][name]
        for value in (size, -1):
            found = f"found {min(value, 0)} ... {max(value, 0)}"
            message = f"{name} {ids.shape} must lie in [0, {size}), {found}"
            yield wrong_value(op, message, **{name: last(ids, value)})


ERRORS = (
    *(bad for op in ATTENTION for bad in shapes_of_attention(op)),
    *(bad for op in MASKED for bad in shapes_of_masks(op)),
    *(bad for book in BOOKS for bad in shapes_of_books(*book)),
    *other_shapes(),
    *of_vq_attention(),
    *types(),
    *numbers(),
    *values(),
)
