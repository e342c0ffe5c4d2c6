"""The one table of mechanisms: which arrays each takes and how each backend calls it."""

import contextlib
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from bench.job import STEP, Job, Point, is_exact, is_windowed

PACKAGES = {"jax": "jax_vq", "torch": "torch_ref"}
BACKENDS = tuple(PACKAGES)
# Kernels of exact attention that can be asked for, and what each framework calls them.
KERNELS = {
    "jax": {"cudnn": "cudnn", "xla": "xla"},
    "torch": {
        "cudnn": "CUDNN_ATTENTION",
        "flash": "FLASH_ATTENTION",
        "efficient": "EFFICIENT_ATTENTION",
        "math": "MATH",
    },
}
NO_WEIGHT = -1e9  # added to a score, so that its weight is 0 in every dtype
DIFFERENTIABLE = ("q", "k", "v")  # the first arguments of every mechanism

Shape = tuple[int, ...]


class UnavailableError(Exception):
    """A kernel that was asked for cannot run here; the message says which and why."""


class Built(NamedTuple):
    """A mechanism of one backend, ready to be called."""

    fn: Callable[..., Any]  # of the arrays that `Mechanism.arrays` names, to [B, T, H, V]
    implementation: str  # the kernel that runs: 'xla', 'cudnn', 'eager', 'flash', ...


class Mechanism(NamedTuple):
    """One attention mechanism.

    Attributes:
      title: as plots and tables name it.
      arrays: the names of its arguments, see `array_shapes`.
      quantized: those of q and k that it quantizes, with their codebooks.
      build: `(backend, job, is_causal, arrays) -> Built`; arrays may be shapes only.
    """

    title: str
    arrays: tuple[str, ...]
    quantized: tuple[tuple[str, str], ...]
    build: Callable[[str, Job, bool, tuple[Any, ...]], Built]


def array_shapes(job: Job, length: int, n_sample_set: int) -> dict[str, tuple[Shape, str]]:
    """Shape and dtype of every array a mechanism may take; codebooks and directions stay precise."""
    precise = "float64" if job.dtype == "float64" else "float32"
    tokens = job.batch, length, job.heads
    return {
        "q": ((*tokens, job.width), job.dtype),
        "k": ((*tokens, job.width), job.dtype),
        "v": ((*tokens, job.value_width), job.dtype),
        "d_out": ((*tokens, job.value_width), job.dtype),
        "codebook_q": ((job.heads, job.codes_q, job.width), precise),
        "codebook_k": ((job.heads, job.codes_k, job.width), precise),
        "directions": ((job.heads, job.n_projection, job.width), precise),
        "sample_ids": ((job.batch, n_sample_set, job.n_sample, job.heads), "int32"),
    }


def unsupported(backend: str, job: Job, point: Point) -> str | None:
    """Why a backend cannot run a mechanism for this job, or None."""
    if is_windowed(point.mechanism) and not point.is_causal:
        return "an exact window is of causal attention only"
    if point.mechanism == "exact_window" and point.direction == STEP:
        return "the window alone is measured on whole sequences only"
    if point.mechanism == "hyper" and point.direction == STEP:
        return "HyperAttention has no step: it sorts whole sequences"
    if kernel_of(point.mechanism) is not None and point.direction == STEP:
        return "one token is timed with the kernels that are picked for it"
    if is_exact(point.mechanism) and backend == "jax":
        if job.width != job.value_width:
            return f"jax.nn.dot_product_attention needs d_k == d_v, found {job.width} and {job.value_width}"
        if job.dtype == "float64":
            return "jax.nn.dot_product_attention computes float64 in float32"
    return None


def _ops(backend: str) -> Any:
    return importlib.import_module(PACKAGES[backend])


def _default_implementation(backend: str) -> str:
    return {"jax": "xla", "torch": "eager"}[backend]


def vq_options(mechanism: str, job: Job) -> dict[str, Any]:
    """Options of `vq_attention`, of its state too, that a mechanism calls it with."""
    mem_len, n_sink = job.window(mechanism)
    return {"block_len": job.block_len, "mem_len": mem_len, "n_sink": n_sink}


def vq_implementation(backend: str, call: Callable[..., Any], *arrays: Any) -> str:
    """What runs the steps of a call: a name for all of them, or several."""
    if backend != "jax":
        return _default_implementation(backend)
    what_runs = importlib.import_module("jax_vq.ops.implementations").what_runs
    return " + ".join(sorted(what_runs(call, *arrays)))


def _build_vq(mechanism: str, backend: str, job: Job, is_causal: bool, arrays: tuple[Any, ...]) -> Built:
    options = vq_options(mechanism, job) | ({"implementation": "xla"} if kernel_of(mechanism) else {})
    op = partial(_ops(backend).vq_attention, is_causal=is_causal, scale=1.0, **options)

    def keys_only(q: Any, k: Any, v: Any, codebook_k: Any) -> Any:
        return op(q, k, v, None, codebook_k)

    has_query_codes = "codebook_q" in MECHANISMS[mechanism].arrays
    fn = op if has_query_codes else keys_only
    return Built(fn, vq_implementation(backend, fn, *arrays))


def _build_window(backend: str, job: Job, is_causal: bool, arrays: tuple[Any, ...]) -> Built:
    """The window form with its coded part switched off: one code, at no weight."""
    options = vq_options("exact_window", job)
    op = partial(_ops(backend).vq_attention, is_causal=is_causal, scale=1.0, **options)

    def window(q: Any, k: Any, v: Any) -> Any:
        codebook_k = 0 * k[0, :1].swapaxes(0, 1)
        return op(q, k, v, None, codebook_k, code_bias=codebook_k[:, 0, 0] + NO_WEIGHT)

    return Built(window, vq_implementation(backend, window, *arrays))


def _build_hyper(backend: str, job: Job, is_causal: bool, arrays: tuple[Any, ...]) -> Built:
    op = _ops(backend).hyper_attention
    sizes = {"block_size": job.block_size, "min_seq_len": job.min_seq_len}
    return Built(partial(op, is_causal=is_causal, scale=1.0, **sizes), _default_implementation(backend))


def kernel_of(mechanism: str) -> str | None:
    """The kernel that 'exact_flash' and 'vq_qk_xla' and the like name; None for all other mechanisms."""
    if mechanism.endswith("_xla"):
        return "xla"
    return mechanism.removeprefix("exact_") if is_exact(mechanism) and mechanism != "exact" else None


def has_kernel(backend: str, mechanism: str) -> bool:
    """Whether a framework has the kernel that a mechanism names, if it names one."""
    return kernel_of(mechanism) in (None, *KERNELS[backend])


def _build_exact(mechanism: str, backend: str, job: Job, is_causal: bool, arrays: tuple[Any, ...]) -> Built:
    """The framework's own kernel, called directly."""
    build = {"jax": _exact_jax, "torch": _exact_torch}[backend]
    return build(kernel_of(mechanism), job, is_causal, arrays)


def jax_kernel(job: Job) -> str:
    """What `jax.nn.dot_product_attention` runs on: cuDNN has its own backward pass."""
    import jax

    is_half = job.dtype in ("bfloat16", "float16")
    fits = job.width == job.value_width and job.width % 8 == 0 and job.width <= 128
    return "cudnn" if jax.default_backend() == "gpu" and is_half and fits else "xla"


def _exact_jax(kernel: str | None, job: Job, is_causal: bool, arrays: tuple[Any, ...]) -> Built:
    import jax

    is_half = job.dtype in ("bfloat16", "float16")
    implementation = kernel or jax_kernel(job)
    if kernel == "cudnn" and jax_kernel(job) != "cudnn":
        raise UnavailableError(f"cudnn runs here on no {job.dtype} of width {job.width}, {job.value_width}")

    def exact(q: Any, k: Any, v: Any) -> Any:
        with jax.default_matmul_precision("default" if is_half else "highest"):
            return jax.nn.dot_product_attention(
                q, k, v, scale=1.0, is_causal=is_causal, implementation=implementation
            )

    return Built(exact, implementation)


def _exact_torch(asked: str | None, job: Job, is_causal: bool, arrays: tuple[Any, ...]) -> Built:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def exact(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=1.0)
        return out.transpose(1, 2)

    def forced(kernel: Any, *arrays: Any) -> Any:
        with sdpa_kernel(kernel):
            return exact(*arrays)

    def probe(kernel: Any) -> None:
        """RuntimeError where a kernel cannot do these arrays, backward too if they need gradients."""
        out = forced(kernel, q[:, :128], k[:, :128], v[:, :128])
        if out.requires_grad:
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    q, k, v = arrays
    if asked is not None:
        kernel = getattr(SDPBackend, KERNELS["torch"][asked])
        try:
            probe(kernel)
        except RuntimeError as error:
            raise UnavailableError(f"{asked} runs here on no {job.dtype}: {error}") from error
        return Built(partial(forced, kernel), asked)
    if q.device.type != "cuda":
        name = "sdpa"  # where torch does not tell what it chooses
        with contextlib.suppress(RuntimeError):
            q, k, v = (x.transpose(1, 2) for x in arrays)
            name = _kernel_name(SDPBackend(torch._fused_sdp_choice(q, k, v, is_causal=is_causal)))
        return Built(exact, name)
    # By default torch takes flash on Hopper, where cuDNN is about twice as fast.
    is_half = job.dtype in ("bfloat16", "float16")
    kernels = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION) if is_half else ()
    for kernel in (*kernels, SDPBackend.EFFICIENT_ATTENTION):
        with contextlib.suppress(RuntimeError):
            probe(kernel)
            return Built(partial(forced, kernel), _kernel_name(kernel))
    return Built(partial(forced, SDPBackend.MATH), _kernel_name(SDPBackend.MATH))


def _kernel_name(kernel: Any) -> str:
    """'flash' of SDPBackend.FLASH_ATTENTION."""
    return str(kernel.name).removesuffix("_ATTENTION").lower()


def _vq(mechanism: str, title: str, *quantized: str) -> Mechanism:
    """VQ-attention that quantizes those of q and k that are named."""
    codebooks = tuple(f"codebook_{name}" for name in quantized)
    return Mechanism(
        title=title,
        arrays=("q", "k", "v", *codebooks),
        quantized=tuple(zip(quantized, codebooks, strict=True)),
        build=partial(_build_vq, mechanism),
    )


def _exact(mechanism: str, title: str) -> Mechanism:
    """Exact attention, by the kernel that the mechanism names."""
    return Mechanism(title, ("q", "k", "v"), (), partial(_build_exact, mechanism))


MECHANISMS: dict[str, Mechanism] = {
    "vq_qk": _vq("vq_qk", "VQ-attention, queries and keys", "q", "k"),
    "vq_qk_xla": _vq("vq_qk_xla", "VQ-attention, queries and keys, plain XLA", "q", "k"),
    "vq_k": _vq("vq_k", "VQ-attention, keys only", "k"),
    "vq_qk_window": _vq("vq_qk_window", "VQ-attention with an exact window, queries and keys", "q", "k"),
    "vq_k_window": _vq("vq_k_window", "VQ-attention with an exact window, keys only", "k"),
    "exact_window": Mechanism(
        title="exact window and sinks alone",
        arrays=("q", "k", "v"),
        quantized=(),
        build=_build_window,
    ),
    "hyper": Mechanism(
        title="HyperAttention",
        arrays=("q", "k", "v", "directions", "sample_ids"),
        quantized=(),
        build=_build_hyper,
    ),
    "exact": _exact("exact", "exact attention"),
    **{
        f"exact_{kernel}": _exact(f"exact_{kernel}", f"exact attention, {kernel}")
        for kernel in dict.fromkeys(kernel for kernels in KERNELS.values() for kernel in kernels)
    },
}


# Those that pick their own kernel: what a suite runs when it is not told.
OWN_KERNEL = tuple(name for name in MECHANISMS if kernel_of(name) is None)


def default_mechanisms(job: Job) -> tuple[str, ...]:
    """All that pick their own kernel; the window form only where the job has a window or sinks."""
    return tuple(name for name in OWN_KERNEL if job.has_exact_part or not is_windowed(name))


def position(mechanism: str) -> int:
    """Where a mechanism stands among all; those of older results, which are no more, are last."""
    return list(MECHANISMS).index(mechanism) if mechanism in MECHANISMS else len(MECHANISMS)


def build(mechanism: str, backend: str, job: Job, is_causal: bool, arrays: tuple[Any, ...]) -> Built:
    """The callable of a mechanism in a backend for these arrays (or their shapes)."""
    return MECHANISMS[mechanism].build(backend, job, is_causal, arrays)
