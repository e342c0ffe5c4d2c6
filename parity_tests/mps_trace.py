"""A trace of the operator calls that torch makes, each held against `mps_rules`."""

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from parity_tests.mps_rules import FACTORIES, PYTHON, SDPA, Call, rules_from, torch_floor

ROOT = Path(__file__).parents[1]
MPS = torch.device("mps")
_DEVICE_OF = torch.Tensor.device.__get__  # type: ignore[attr-defined]


class Trace:
    """Every operator call inside `with Trace() as trace`, checked as it is made.

    Args:
      floor: version of torch, see `mps_rules`; default `torch_floor()`.
      on: the device of all tensors, cpu or meta. Python code is told that they are on MPS, and
        takes the path that it takes there.

    Attributes:
      violations: of the rules that torch `floor` and newer need.
      names: of the operators that were called.
    """

    def __init__(self, floor: tuple[int, int] | None = None, *, on: str = "cpu"):
        self.rules = rules_from(torch_floor() if floor is None else floor)
        self.violations: set[str] = set()
        self.names: set[str] = set()
        self.device = torch.device(on)
        self._modes = ExitStack()

    def __enter__(self) -> "Trace":
        self._modes.enter_context(_PythonCalls(self))
        self._modes.enter_context(_OperatorCalls(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._modes.close()

    def add(self, call: Call) -> None:
        self.names.add(call.name)
        for rule in self.rules:
            if (rule.operators is None or call.name in rule.operators) and (problem := rule.problem(call)):
                place = caller() or ("autograd" if call.is_backward else "the test")
                self.violations.add(f"{rule.name}: {call.name} in {place}: {problem} [{rule.source}]")


class _OperatorCalls(TorchDispatchMode):
    def __init__(self, trace: Trace):
        super().__init__()
        self.trace = trace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if func.namespace == "aten":
            name, overload, formal = func._schema.name, func._schema.overload_name, func._schema.arguments
            arguments = dict(zip((a.name for a in formal), args, strict=False)) | (kwargs or {})
            written = [arguments.get(a.name) for a in formal if a.alias_info and a.alias_info.is_write]
            self.trace.add(_call(name.removeprefix("aten::"), overload, arguments, written, results))
        return results


class _PythonCalls(TorchFunctionMode):
    def __init__(self, trace: Trace):
        super().__init__()
        self.trace = trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _DEVICE_OF:
            return MPS
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == SDPA or (name in FACTORIES and caller()):
            self.trace.add(_call(name, PYTHON, dict(enumerate(args)) | kwargs))
        args, kwargs = tuple(map(self._moved, args)), {key: self._moved(x) for key, x in kwargs.items()}
        return func(*args, **kwargs)

    def _moved(self, value: Any) -> Any:
        return self.trace.device if isinstance(value, torch.device) and value == MPS else value


def _call(name: str, overload: str, arguments: dict[Any, Any], written: Any = (), results: Any = ()) -> Call:
    is_backward = torch._C._current_graph_task_id() != -1
    tensors = tensors_in(list(arguments.values()))
    return Call(name, overload, arguments, tensors, tensors_in(written), tensors_in(results), is_backward)


def tensors_in(values: Any) -> tuple[Tensor, ...]:
    """The tensors of nested lists and tuples."""
    if isinstance(values, Tensor):
        return (values,)
    return tuple(x for value in values for x in tensors_in(value)) if isinstance(values, list | tuple) else ()


def caller() -> str:
    """The two innermost lines of torch_ref on the stack; '' for a call from elsewhere."""
    frame, package = sys._getframe(1), str(ROOT / "torch_ref")
    lines: list[str] = []
    while frame.f_back is not None and len(lines) < 2:
        if frame.f_code.co_filename.startswith(package):
            lines.append(f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(lines)
