"""GPU kernels of steps of the ops; importing this package adds them (`ops.implementations`).

A kernel is loaded, and Pallas with it, when one is first wanted on a device that can run it. A jax without
Pallas for Triton, which is deprecated upstream, runs every step as plain XLA.
"""

import importlib
import importlib.util
from functools import partial

from jax_vq.ops.implementations import Kernel, add_kernel

FILES = {
    "finite_codes": "quantize",
    "nearest_codes": "quantize",
    "count_keys": "vq_full",
    "full_attention": "vq_full",
    "causal_attention": "vq_causal",
    "causal_gradients": "vq_causal_grad",
}


def load(step: str) -> Kernel | None:
    """The kernel of a step, None in a jax without Pallas for Triton."""
    if importlib.util.find_spec("jax.experimental.pallas.triton") is None:
        return None
    kernels: dict[str, Kernel] = importlib.import_module(f"jax_vq.kernels.{FILES[step]}").KERNELS
    return kernels[step]


for _step in FILES:
    add_kernel(_step, partial(load, _step))
