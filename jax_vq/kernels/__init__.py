"""GPU kernels of steps of the ops; importing this package adds them (`ops.implementations`).

A jax without Pallas for Triton, which is deprecated upstream, runs every step as plain XLA.
"""

import importlib
import importlib.util

if importlib.util.find_spec("jax.experimental.pallas.triton") is not None:
    for name in ("quantize", "vq_causal", "vq_causal_grad", "vq_full"):
        importlib.import_module(f"jax_vq.kernels.{name}")
