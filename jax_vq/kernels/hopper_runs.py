"""A piece in PTX that adds up vectors in the order of their codes, run by run."""

from typing import Any

from jax_vq.kernels.hopper_order import LANES, N_WARP, missing, piece

N_LOAD = 8  # of 16 bytes that a thread has under way
BYTES = 16


def add_up(n_code: int) -> Any:
    """Sums by code `[C, V]` float32 of vectors `[T, V]` in memory, bfloat16 or float32.

    Every warp has an equal share of the order. Of a run that started in an earlier share the sum is left in
    `cut [W, V]`, for the warp that it started with. If a token is missing, all sums are NaN; if a vector is
    not finite, those of its columns are.
    """

    def text(vectors: Any, order: Any, start: Any, cut: Any, sums: Any) -> str:
        from jaxlib.mlir import ir

        n_byte = 2 if vectors.element_type == ir.BF16Type.get() else 4
        stride, out_stride = (x.get_strides_and_offset()[0][0] for x in (vectors, sums))
        return _text(n_code, vectors.shape[1], n_byte, n_byte * stride, 4 * out_stride)

    return piece("vectors order start cut sums", "", text)


def _each(text: str, n: int = 4) -> str:
    """A text for each of a few numbers, "#" in it."""
    return " ".join(text.replace("#", str(i)) for i in range(n))


def _four(name: str, first: int = 0) -> str:
    return "{" + ", ".join(f"{name}{first + i}" for i in range(4)) + "}"


def _text(n_code: int, width: int, n_byte: int, stride: int, out_stride: int) -> str:
    """Lanes of a part of a warp share a vector; of bfloat16, two parts write half of a sum each."""
    n_own = BYTES // n_byte  # columns of a thread
    n_lane = width // n_own
    n_part = 32 // n_lane
    step = n_part * N_LOAD
    loads = "".join(f"ld.shared.u16 token{i}, [from + {2 * n_part * i}];\n" for i in range(N_LOAD))
    loads += "".join(
        f"""
        setp.gt.s32 p, left, {n_part * i};
        {_each(f"mov.b32 x{i}_#, 0;")}
        cvt.u32.u16 number{i}, token{i};
        mad.wide.u32 at{i}, number{i}, {stride}, vectors;
        @p ld.global.nc.v4.b32 {_four(f"x{i}_")}, [at{i}];
        """
        for i in range(N_LOAD)
    )
    registers = "".join(f".reg .b32 x{i}_<4>;\n" for i in range(N_LOAD))
    if n_byte == 2:
        adds = "".join(
            f"""
            shl.b32 bits, x{i}_{k}, 16; mov.b32 y, bits; add.f32 a{2 * k}, a{2 * k}, y;
            and.b32 bits, x{i}_{k}, 0xffff0000; mov.b32 y, bits; add.f32 a{2 * k + 1}, a{2 * k + 1}, y;
            """
            for i in range(N_LOAD)
            for k in range(4)
        )
    else:
        adds = "".join(_each(f"mov.b32 y, x{i}_#; add.f32 a#, a#, y;") for i in range(N_LOAD))
    fold = "".join(
        f"""
        mov.b32 bits, a{k}; shfl.sync.bfly.b32 bits, bits, {distance}, 31, {LANES};
        mov.b32 y, bits; add.f32 a{k}, a{k}, y;
        """
        for distance in (4, 8, 16)
        if distance >= n_lane
        for k in range(n_own)
    )
    pick = "".join(f"selp.f32 s{k}, a{k + n_own - 4}, a{k}, is_high;\n" for k in range(4))
    return f"""
    .reg .pred p, is_high, is_writer, is_open;
    .reg .b16 token<{N_LOAD}>;
    .reg .b32 number<{N_LOAD}>, warp, part, column, share, begin, stop, here, n, at, x, top;
    .reg .b32 first, end, last, left, from, bits, place;
    .reg .f32 a<8>, s<4>, t<4>, bad<4>, spoil, y;
    .reg .b64 address, at<{N_LOAD}>;
    {registers}
    shr.u32 warp, thread, 5;
    and.b32 column, thread, {n_lane - 1};
    bfe.u32 part, thread, {n_lane.bit_length() - 1}, {n_part.bit_length() - 1};
    setp.eq.u32 is_high, part, 1;
    setp.lt.u32 is_writer, part, {n_own // 4};
    mul.lo.u32 place, column, {4 * n_own};
    mad.lo.u32 place, part, 16, place;
    mad.wide.u32 sums, place, 1, sums;
    mad.wide.u32 vectors, column, {BYTES}, vectors;
    add.u32 place, place, cut;
    mad.lo.u32 cut, warp, {4 * width}, place;
    ld.shared.u32 x, [start + {missing(n_code)}];
    setp.ne.u32 p, x, 0;
    selp.f32 spoil, 0f7fffffff, 0f00000000, p;
    {_each("mov.f32 t#, spoil; mov.f32 bad#, 0f00000000;")}

    // codes without tokens
    mov.b32 n, warp;
UNUSED:
    mad.lo.u32 at, n, 4, start;
    ld.shared.u32 first, [at];
    ld.shared.u32 end, [at + 4];
    setp.eq.and.u32 p, first, end, is_writer;
    mad.wide.u32 address, n, {out_stride}, sums;
    @p st.global.v4.f32 [address], {_four("t")};
    add.u32 n, n, {N_WARP};
    setp.lt.u32 p, n, {n_code};
    @p bra.uni UNUSED;

    // the share, and the code that it starts in: the last one that starts no later
    ld.shared.u32 n, [start + {4 * n_code}];
    add.u32 share, n, {N_WARP - 1};
    div.u32 share, share, {N_WARP};
    mul.lo.u32 begin, warp, share;
    min.u32 begin, begin, n;
    add.u32 stop, begin, share;
    min.u32 stop, stop, n;
    mov.b32 at, start;
    add.u32 top, start, {4 * (n_code - 1)};
    mov.b32 n, {2 << (n_code - 1).bit_length()};
SEARCH:
    add.u32 x, at, n;
    min.u32 x, x, top;
    ld.shared.u32 first, [x];
    setp.le.u32 p, first, begin;
    @p mov.b32 at, x;
    shr.u32 n, n, 1;
    setp.ge.u32 p, n, 4;
    @p bra.uni SEARCH;

    mov.b32 here, begin;
    mov.b32 end, 0;
    setp.ne.u32 is_open, end, 0;
RUN:
    setp.ge.u32 p, here, stop;
    @p bra.uni CUTS;
NEXT:
    ld.shared.u32 end, [at + 4];
    setp.gt.u32 p, end, here;
    @p bra.uni FOUND;
    add.u32 at, at, 4;
    bra.uni NEXT;
FOUND:
    min.u32 last, end, stop;
    {_each("mov.f32 a#, 0f00000000;", 8)}
    sub.u32 n, last, here;
    sub.u32 left, n, part;
    add.u32 from, here, part;
    mad.lo.u32 from, from, 2, order;
ROWS:
    {loads}
    {adds}
    sub.u32 left, left, {step};
    sub.u32 n, n, {step};
    add.u32 from, from, {2 * step};
    setp.gt.s32 p, n, 0;
    @p bra.uni ROWS;
    {fold}
    {pick}
    {_each("fma.rn.f32 bad#, s#, 0f00000000, bad#; add.f32 s#, s#, spoil;")}
    sub.u32 x, at, start;
    shr.u32 x, x, 2;
    mad.wide.u32 address, x, {out_stride}, sums;
    ld.shared.u32 first, [at];
    setp.lt.u32 p, first, here;
    mov.b32 here, last;
    @p bra.uni CUT;
    setp.gt.u32 is_open, end, stop;
    @is_open bra.uni CUTS;
    @is_writer st.global.v4.f32 [address], {_four("s")};
    bra.uni RUN;
CUT:
    @is_writer st.shared.v4.f32 [cut], {_four("s")};
    bra.uni RUN;

CUTS:
    bar.sync 0;
    @!is_open bra.uni WHOLE;
    mov.b32 here, stop;
    mov.b32 x, cut;
REST:
    add.u32 x, x, {4 * width};
    @is_writer ld.shared.v4.f32 {_four("a")}, [x];
    {_each("add.f32 s#, s#, a#;")}
    add.u32 here, here, share;
    setp.lt.u32 p, here, end;
    @p bra.uni REST;
    @is_writer st.global.v4.f32 [address], {_four("s")};
WHOLE:
    add.f32 y, bad0, bad1;
    add.f32 y, y, bad2;
    add.f32 y, y, bad3;
    setp.nan.and.f32 p, y, y, is_writer;
    barrier.cta.red.or.pred p, 0, p;
    @!p bra.uni FINITE;

    // what is not finite, of all warps
    @is_writer st.shared.v4.f32 [cut], {_four("bad")};
    bar.sync 0;
    {_each("mov.f32 t#, 0f00000000;")}
    mov.b32 n, 0;
WARPS:
    @is_writer ld.shared.v4.f32 {_four("a")}, [place];
    {_each("add.f32 t#, t#, a#;")}
    add.u32 place, place, {4 * width};
    add.u32 n, n, 1;
    setp.lt.u32 p, n, {N_WARP};
    @p bra.uni WARPS;
    mov.b32 n, warp;
CODES:
    mad.wide.u32 address, n, {out_stride}, sums;
    @is_writer ld.global.v4.f32 {_four("a")}, [address];
    {_each("add.f32 a#, a#, t#;")}
    @is_writer st.global.v4.f32 [address], {_four("a")};
    add.u32 n, n, {N_WARP};
    setp.lt.u32 p, n, {n_code};
    @p bra.uni CODES;
FINITE:
    """
