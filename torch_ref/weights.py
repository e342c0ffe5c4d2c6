"""Weights and codebook state in one safetensors file, of one naming in both backends.

Names are dotted paths of attributes; a matrix is `weight [out, in]`, as in PyTorch. So a file
that jax wrote loads in `torch_ref`, and back.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from vq_common.weights import check_weights, whole_file


def save_weights(module: nn.Module, path: str | Path) -> None:
    """Write the parameters and state of `module` to a safetensors file.

    Random streams are not part of it. The file appears whole or not at all.

    Raises:
      OSError: the file cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    with whole_file(path) as partial:
        save_file(tensors, partial)


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Read a file of `save_weights`, of either backend, into `module`, in place.

    A wider type of the module takes a narrower one of the file; never the reverse.

    Raises:
      ValueError, TypeError: not such a file, a name is missing or left over, a shape differs, a
        value would lose precision; the module is then unchanged.
      OSError: the file cannot be read.
    """
    state = module.state_dict()
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    check_weights(path, _layout(state), _layout(tensors))
    module.load_state_dict(tensors)


def _layout(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (tuple(a.shape), str(a.dtype).removeprefix("torch.")) for name, a in tensors.items()}
