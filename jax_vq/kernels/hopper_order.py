"""Pieces in PTX that put the tokens of a program in the order of their codes: a counting sort.

Every warp counts by itself and has places of its own, so that the order does not depend on which is faster:
by code, then by warp, then as they came. In shared memory there are
  place `[W, C]` int32: how many tokens of a code a warp met, then where its first one goes;
  start int32: where the tokens of each code start, where all end, and what `starts` and `count` leave;
  rank, order `[T]` int16: how many tokens of its code its warp met before a token; tokens in order.
"""

from collections.abc import Callable
from typing import Any

from jax_vq.kernels.hopper_pieces import BLOCK
from jax_vq.kernels.hopper_threads import integer, pointer

N_WARP = 16
LANES = "0xffffffff"  # all of a warp


def n_start(n_code: int) -> int:
    """Length of `start`."""
    return n_code + N_WARP + 2


def missing(n_code: int) -> int:
    """Where in `start`, in bytes, it says whether a token is missing."""
    return 4 * (n_code + N_WARP + 1)


def piece(refs: str, numbers: str, text: Callable[..., str]) -> Any:
    """A piece in PTX, on names: addresses of arrays, a thread's entries of `[BLOCK]` arrays, and `thread`.

    `text` is given the types of the arrays. Threads of a warp run it together.
    """
    from jax.experimental.mosaic.gpu import utils
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm, vector

    names = *refs.split(), *numbers.split(), "thread"
    n_ref = len(refs.split())
    single = plgpu.Layout.WG_STRIDED((BLOCK,), vec_size=1)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * n_ref + (single,) * (len(names) - 1 - n_ref))
    def run(_: Any, *arguments: Any) -> None:
        arrays, entries = arguments[:n_ref], arguments[n_ref:]
        letters = ["r" if utils.is_smem_ref(x) else "l" for x in arrays] + ["r"] * (len(names) - n_ref)
        inputs = [pointer(x, integer(0)) for x in arrays]
        inputs += [vector.extract(x.registers.reshape(-1)[0], [], [0]) for x in entries]
        inputs.append(utils.thread_idx())
        ptx = "".join(
            f".reg .b{32 if letter == 'r' else 64} {name}; mov.b{32 if letter == 'r' else 64} {name}, ${i};\n"
            for i, (name, letter) in enumerate(zip(names, letters, strict=True))
        )
        ptx += text(*(ir.MemRefType(x.type) for x in arrays))
        options = {"convergent": True} if hasattr(llvm.InlineAsmOp, "convergent") else {}
        void = ir.Type.parse("!llvm.void")
        llvm.inline_asm(void, inputs, "{\n" + ptx + "}", ",".join(letters), has_side_effects=True, **options)

    return run


def clear(n_code: int) -> Any:
    """No counts, and no token missing; of a number of codes that 32 divides."""
    zeros = "".join(f"st.shared.b32 [at + {128 * i}], 0;\n" for i in range(n_code // 32))
    text = f"""
        .reg .pred p; .reg .b32 at, x;
        shr.u32 x, thread, 5;
        mad.lo.u32 at, x, {4 * n_code}, place;
        and.b32 x, thread, 31;
        mad.lo.u32 at, x, 4, at;
        {zeros}
        setp.eq.u32 p, thread, 0;
        @p st.shared.b32 [start + {missing(n_code)}], 0;
        bar.sync 0;
    """
    return piece("place start", "", lambda *_: text)


def count(n_code: int) -> Any:
    """Count the codes of a block, and write its tokens' ranks; a code of -1 is missing, others are nowhere.

    Lanes of a warp that have the same code are found bit by bit; the last of them counts for all.
    """
    same = "".join(
        f"""
        and.b32 x, code, {2**bit};
        setp.ne.u32 p, x, 0;
        vote.sync.ballot.b32 x, p, {LANES};
        @!p not.b32 x, x;
        and.b32 peers, peers, x;
        """
        for bit in range((n_code - 1).bit_length())
    )
    text = f"""
        .reg .pred here, p; .reg .b16 short; .reg .b32 peers, at, before, x;
        setp.eq.s32 p, code, -1;
        @p st.shared.b32 [start + {missing(n_code)}], 1;
        setp.lt.u32 here, code, {n_code};
        vote.sync.ballot.b32 peers, here, {LANES};
        {same}
        mov.u32 x, %lanemask_lt;
        and.b32 x, x, peers;
        popc.b32 before, x;
        shr.u32 at, thread, 5;
        mad.lo.u32 at, at, {n_code}, code;
        mad.lo.u32 at, at, 4, place;
        mov.b32 x, 0;
        @here ld.shared.u32 x, [at];
        add.u32 before, before, x;
        bar.warp.sync {LANES};
        mov.u32 x, %lanemask_gt;
        and.b32 x, x, peers;
        setp.eq.and.u32 p, x, 0, here;
        add.u32 x, before, 1;
        @p st.shared.u32 [at], x;
        bar.warp.sync {LANES};
        cvt.u16.u32 short, before;
        mad.lo.u32 at, token, 2, rank;
        @here st.shared.u16 [at], short;
    """
    return piece("place start rank", "code token", lambda *_: text)


def starts(n_code: int) -> Any:
    """Of what warps counted, how many tokens each code has, and where they go; a thread has a code."""
    row, warps = 4 * n_code, range(N_WARP)
    read = "".join(
        f"mov.b32 n{w}, 0; @here ld.shared.u32 n{w}, [at + {row * w}]; add.u32 own, own, n{w};\n"
        for w in warps
    )
    scan = "".join(
        f"shfl.sync.up.b32 x|p, total, {2**k}, 0, {LANES}; @p add.u32 total, total, x;\n" for k in range(5)
    )
    add = "".join(
        f"setp.gt.u32 p, warp, {w}; ld.shared.u32 x, [start + {row + 4 + 4 * w}]; @p add.u32 total, total, x;"
        for w in warps
    )
    write = "".join(f"@here st.shared.u32 [at + {row * w}], own; add.u32 own, own, n{w};\n" for w in warps)
    text = f"""
        .reg .pred here, p; .reg .f32 count; .reg .b32 n<{N_WARP}>, own, total, at, warp, x; .reg .b64 out;
        bar.sync 0;
        setp.lt.u32 here, thread, {n_code};
        mad.lo.u32 at, thread, 4, place;
        mov.b32 own, 0;
        {read}
        cvt.rn.f32.u32 count, own;
        mad.wide.u32 out, thread, 4, number;
        @here st.global.f32 [out], count;
        mov.b32 total, own;
        {scan}
        shr.u32 warp, thread, 5;
        and.b32 x, thread, 31;
        setp.eq.u32 p, x, 31;
        mad.lo.u32 x, warp, 4, start;
        @p st.shared.u32 [x + {row + 4}], total;
        bar.sync 0;
        {add}
        mad.lo.u32 x, thread, 4, start;
        @here st.shared.u32 [x + 4], total;
        setp.eq.u32 p, thread, 0;
        @p st.shared.u32 [start], 0;
        sub.u32 own, total, own;
        {write}
        bar.sync 0;
    """
    return piece("place start number", "", lambda *_: text)


def put(n_code: int) -> Any:
    """Put the tokens of a block where they go in the order."""
    text = f"""
        .reg .pred here; .reg .b16 short; .reg .b32 at, x;
        setp.lt.u32 here, code, {n_code};
        shr.u32 at, thread, 5;
        mad.lo.u32 at, at, {n_code}, code;
        mad.lo.u32 at, at, 4, place;
        mov.b32 x, 0;
        @here ld.shared.u32 x, [at];
        mad.lo.u32 at, token, 2, rank;
        mov.b16 short, 0;
        @here ld.shared.u16 short, [at];
        cvt.u32.u16 at, short;
        add.u32 at, at, x;
        mad.lo.u32 at, at, 2, order;
        cvt.u16.u32 short, token;
        @here st.shared.u16 [at], short;
    """
    return piece("place rank order", "code token", lambda *_: text)
