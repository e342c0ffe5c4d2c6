"""Dispatch modes that count the operations and follow the memory of torch calls."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench.cost import sort_operations

# aten operations, beside views, that compute nothing.
_MOVES = frozenset(
    """
    _to_copy arange cat clone constant_pad_nd copy copy_ empty empty_like empty_strided fill_ full full_like
    gather index index_put index_put_ index_select new_empty new_full new_ones new_zeros ones ones_like
    scalar_tensor scatter stack where zero_ zeros zeros_like
    """.split()  # noqa: SIM905
)


def on_meta_tensors(mode: TorchDispatchMode, fn: Callable[..., Any], *args: Tensor) -> None:
    """Call `fn` inside `mode` on tensors like `args` without data: all but the computation happens.

    A backward pass is what `fn` makes of it: no tensor of `args` requires a gradient.
    """
    args = tuple(x.detach().to("meta") for x in args)
    with mode:
        fn(*args)


class CountOperations(TorchDispatchMode):
    """Sums up the operations of everything that runs inside, see `cost`."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.total += _operations(func, args, kwargs or {}, out)
        return out


def _operations(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    packet = func._overloadpacket
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out))
    name = packet.__name__
    if func.is_view or name in _MOVES or not any(isinstance(x, Tensor) for x in tree_leaves(out)):
        return 0
    if name in ("sort", "argsort"):
        axis = kwargs.get("dim", -1)
        return sort_operations(args[0].numel(), args[0].shape[axis])
    return max((x.numel() for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)), default=0)


class TrackMemory(TorchDispatchMode):
    """Follows the storages that are allocated inside: `live` bytes now and at the `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and id(x.untyped_storage()) not in known:
                self._add(x.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key, storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size
