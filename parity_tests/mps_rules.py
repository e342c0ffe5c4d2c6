"""What MPS lacks or gets wrong, each with its source, as rules over a trace of operator calls.

A rule that a torch release fixed names it, and applies while the project allows an older torch
on macOS (`torch_floor`). Not rules, because no torch that is allowed has them: `where` with a
transposed condition (pytorch#150967), SiLU of a view (pytorch#139006), layer_norm of a slice
(pytorch#131750), `all` over more than four axes (pytorch#95538), cumsum of bool (pytorch#96614).
"""

import functools
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchgen
import yaml
from packaging.requirements import Requirement
from torch import Tensor

ROOT = Path(__file__).parents[1]
ISSUE = "github.com/pytorch/pytorch/issues/"
DOCS = "docs.pytorch.org/docs/stable/"

PYTHON = "python"  # the overload of a call of torch's Python interface
SDPA = "scaled_dot_product_attention"
FACTORIES = frozenset(
    ("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "tensor", "zeros")
)
ORDERS = frozenset(
    ("sort", "argsort", "msort", "topk", "kthvalue", "median", "mode", "_unique2", "unique_dim")
)
EXTREMA = frozenset(("amax", "amin", "aminmax", "max", "min"))
MATMULS = frozenset(("mm", "addmm", "bmm", "baddbmm", "addbmm"))
SUMS_BY_INDEX = frozenset(("index_add", "index_reduce", "scatter_add", "scatter_reduce"))
WRITES_BY_INDEX = SUMS_BY_INDEX | {
    "scatter",
    "index_copy",
    "index_fill",
    "masked_scatter",
    "put",
    "index_put",
}

LONGEST_SUM = 32766  # terms of one dot product of a batched matmul
LARGEST_TENSOR = 2**32  # elements


class Call(NamedTuple):
    """One call of an operator."""

    name: str  # without namespace and overload: 'sort', 'scatter_add_'
    overload: str  # '' for the default one
    arguments: dict[Any, Any]  # by the names of the schema
    tensors: tuple[Tensor, ...]  # all arguments that are tensors
    written: tuple[Tensor, ...]  # those that the call changes
    results: tuple[Tensor, ...]
    is_backward: bool


def _names(*names: str) -> frozenset[str]:
    return frozenset(names)


class Rule(NamedTuple):
    """`problem(call)` says what is wrong with a call of one of `operators` (None: of any), or None."""

    name: str
    source: str
    operators: frozenset[str] | None
    problem: Callable[[Call], str | None]
    fixed_in: tuple[int, int] | None = None


def _no_double(call: Call) -> str | None:
    wide = (torch.float64, torch.complex128)
    return next((f"a tensor of {x.dtype}" for x in (*call.tensors, *call.results) if x.dtype in wide), None)


def _is_implemented(call: Call) -> str | None:
    # On the CPU that is how scaled_dot_product_attention runs; MPS has forms of its own.
    if call.overload == PYTHON or call.name.startswith(
        f"_{SDPA.removesuffix('attention')}flash_attention_for_cpu"
    ):
        return None
    name = f"{call.name}.{call.overload}".removesuffix(".")
    return None if name in operators_of_mps() else f"no kernel of aten::{name}"


def _is_on_the_device(call: Call) -> str | None:
    is_default = call.overload == PYTHON and call.arguments.get("device") is None
    if call.arguments.get(0) == (
        0,
    ):  # torch.utils.checkpoint marks its inputs with a tensor without elements
        return None
    return "made on the default device" if is_default else None


def _no_int64(call: Call) -> str | None:
    return "of int64" if call.tensors[0].dtype == torch.int64 else None


def _is_contiguous(call: Call) -> str | None:
    strides = [x.stride() for x in call.tensors if not x.is_contiguous()]
    return f"strides {strides[0]}" if strides else None


def _is_near_axis(call: Call) -> str | None:
    n_axis, axis = call.tensors[0].ndim, call.arguments.get("dim", -1)
    return f"axis {axis} of {n_axis}" if axis % n_axis < n_axis - 4 else None


def _is_last_axis(call: Call) -> str | None:
    axis = call.arguments.get("dim")
    return None if axis in (-1, call.tensors[0].ndim - 1) else f"dim = {axis}"


def _writes_whole_tensors(call: Call) -> str | None:
    views = (x for x in call.written if x.storage_offset() or not x.is_contiguous())
    return next((f"a view, offset {x.storage_offset()}, strides {x.stride()}" for x in views), None)


def _no_atomic_sum(call: Call) -> str | None:
    # In a backward pass it is how autograd differentiates a gather.
    is_sum = call.arguments.get("accumulate", "index_put" not in call.name) and not call.is_backward
    return (
        "in an order that differs from run to run" if is_sum and call.tensors[0].is_floating_point() else None
    )


def _no_broadcast_operand(call: Call) -> str | None:
    for x in call.tensors[-2:]:
        if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
            return f"{tuple(x.shape)} with strides {x.stride()}"
    return None


def _short_sums(call: Call) -> str | None:
    a, b = call.tensors[-2:]
    is_tiled = a.shape[-2] >= 16 and b.shape[-1] >= 16
    return f"{a.shape[-1]} terms" if is_tiled and a.shape[-1] > LONGEST_SUM else None


def _no_huge_tensor(call: Call) -> str | None:
    size = max((x.numel() for x in (*call.tensors, *call.results)), default=0)
    return f"{size} elements" if size >= LARGEST_TENSOR else None


def _differentiates_the_input(call: Call) -> str | None:
    of_input, *of_parameters = call.arguments["output_mask"]
    return "parameters alone are differentiated" if any(of_parameters) and not of_input else None


def _has_one_width(call: Call) -> str | None:
    q, _, v = call.tensors[:3]
    return None if q.shape[-1] == v.shape[-1] else f"q is {q.shape[-1]} wide and v {v.shape[-1]}"


def _has_no_flag_in_half_types(call: Call) -> str | None:
    is_half = call.tensors[0].dtype in (torch.float16, torch.bfloat16)
    return "is_causal in a half type" if is_half and call.arguments.get("is_causal") else None


def _in_place(names: frozenset[str]) -> frozenset[str]:
    """Names and their in-place forms."""
    return names | {f"{name}_" for name in names} | {"_index_put_impl_"}


LAYER_NORM = _names("native_layer_norm_backward")
ACTIVATIONS = _names("sigmoid_backward", "tanh_backward", "logit_backward", "softplus", "softplus_backward")

RULES = (
    Rule("no float64", DOCS + "notes/mps.html (Double-precision types)", None, _no_double),
    Rule("a kernel for MPS", "native_functions.yaml of the installed torch", None, _is_implemented),
    Rule("no huge tensor", ISSUE + "197636, 182052", None, _no_huge_tensor),
    Rule("on the device", DOCS + "tensor_attributes.html (torch.device)", FACTORIES, _is_on_the_device),
    Rule("int64 order", ISSUE + "155560", ORDERS, _no_int64),
    Rule("int64 extremum", ISSUE + "87753, pull 187976", EXTREMA, _no_int64),
    Rule("strided sort", ISSUE + "175187", _names("sort", "argsort", "msort"), _is_contiguous),
    Rule("far axis", ISSUE + "184844", _names("sort", "argsort", "cumsum", "cumprod"), _is_near_axis),
    Rule("strided argmax", ISSUE + "160740", _names("argmax", "argmin"), _is_contiguous),
    Rule("argmax over the last axis", ISSUE + "160740", _names("argmax", "argmin"), _is_last_axis),
    Rule(
        "writes to a view",
        ISSUE + "163327, 195074, 160993",
        _in_place(WRITES_BY_INDEX),
        _writes_whole_tensors,
    ),
    Rule("atomic sum", ISSUE + "161029", _in_place(SUMS_BY_INDEX | {"index_put"}), _no_atomic_sum),
    Rule("broadcast operand", ISSUE + "180201", MATMULS, _no_broadcast_operand),
    Rule("long sums", ISSUE + "195163", _names("bmm", "baddbmm", "addbmm"), _short_sums),
    Rule("strided activation", ISSUE + "175188, 131736", ACTIVATIONS, _is_contiguous),
    Rule("strided SiLU", ISSUE + "175188", _names("silu_backward"), _is_contiguous, (2, 12)),
    Rule(
        "layer norm",
        ISSUE + "183825",
        _names("native_layer_norm_backward"),
        _differentiates_the_input,
        (2, 13),
    ),
    Rule("strided attention", ISSUE + "181133, 163597", _names(SDPA), _is_contiguous, (2, 12)),
    Rule("attention of two widths", ISSUE + "176767", _names(SDPA), _has_one_width, (2, 12)),
    Rule("causal attention", ISSUE + "195910", _names(SDPA), _has_no_flag_in_half_types, (2, 13)),
)


def rules_from(floor: tuple[int, int]) -> tuple[Rule, ...]:
    """The rules that some torch of version `floor` or newer needs."""
    return tuple(rule for rule in RULES if rule.fixed_in is None or rule.fixed_in > floor)


def torch_floor() -> tuple[int, int]:
    """The oldest torch that the `torch` extra allows on macOS."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    floors = []
    for requirement in map(Requirement, project["optional-dependencies"]["torch"]):
        if requirement.marker is None or requirement.marker.evaluate({"sys_platform": "darwin"}):
            floors += [spec.version.split(".") for spec in requirement.specifier if spec.operator == ">="]
    return max((int(major), int(minor)) for major, minor, *_ in floors)


@functools.cache
def operators_of_mps() -> frozenset[str]:
    """Names (with overload) that torch's own list dispatches to MPS or composes of other operators."""
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    listed = {entry["func"].split("(")[0]: entry for entry in yaml.load(path.read_bytes(), loader)}  # noqa: S506

    def runs(entry: dict[str, Any]) -> bool:
        delegate = entry.get("structured_delegate")
        keys = [key.strip() for group in entry.get("dispatch", ()) for key in group.split(",")]
        is_composed = not delegate and (not keys or any(key.startswith("Composite") for key in keys))
        return is_composed or "MPS" in keys or bool(delegate and runs(listed[delegate]))

    return frozenset(name for name, entry in listed.items() if runs(entry))
