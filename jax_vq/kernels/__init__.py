"""GPU kernels of steps of the ops; importing this package adds them (`ops.implementations`)."""

from jax_vq.kernels import quantize as quantize
from jax_vq.kernels import vq_causal as vq_causal
from jax_vq.kernels import vq_causal_grad as vq_causal_grad
from jax_vq.kernels import vq_full as vq_full
