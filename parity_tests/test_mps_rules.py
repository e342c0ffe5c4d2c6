"""The rules of the MPS audit catch what they are for, and nothing else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from parity_tests.mps_rules import RULES, rules_from
from parity_tests.mps_trace import Trace


def _attend(dtype: torch.dtype = torch.float32, v_width: int = 4, **options: Any) -> None:
    q, v = torch.zeros((2, 3, 5, 4), dtype=dtype), torch.zeros((2, 3, 5, v_width), dtype=dtype)
    F.scaled_dot_product_attention(q, q, v, **options)


def _normalise(x: Tensor) -> None:
    weight = torch.ones(3, requires_grad=True)
    F.layer_norm(x, (3,), weight).sum().backward()


def _activate(activation: Callable[[Tensor], Tensor]) -> None:
    activation(torch.rand(4, 3, requires_grad=True).t()).backward(torch.rand(4, 3).t())


INDEX, ONES = torch.tensor([0, 1]), torch.ones(2)
PLANTED: dict[str, tuple[Callable[[], Any], ...]] = {
    "no float64": (lambda: torch.zeros(3).double(), lambda: torch.zeros(2, dtype=torch.float64)),
    "a kernel for MPS": (lambda: torch.linalg.eigh(torch.eye(2)), lambda: torch.zeros(3).take(INDEX)),
    "int64 order": (
        lambda: torch.arange(3).sort(),
        lambda: torch.arange(3).argsort(),
        lambda: torch.arange(3).topk(2),
    ),
    "int64 extremum": (lambda: torch.arange(3).amax(), lambda: torch.arange(3).min()),
    "strided sort": (lambda: torch.rand(3, 2).t().sort(stable=True), lambda: torch.rand(6)[::2].argsort()),
    "far axis": (lambda: torch.ones(2, 1, 1, 1, 1).cumsum(0), lambda: torch.ones(2, 1, 1, 1, 1).sort(-5)),
    "strided argmax": (lambda: torch.rand(3, 2).t().argmax(-1), lambda: torch.rand(3, 4)[:, 1:].argmin(-1)),
    "argmax over the last axis": (lambda: torch.rand(3, 2).argmax(0), lambda: torch.rand(3, 2).argmax()),
    "writes to a view": (
        lambda: torch.zeros(2, 4)[1].scatter_add_(0, INDEX, ONES),
        lambda: torch.zeros(4, 2).t()[0].index_put_((INDEX,), ONES),
        lambda: torch.zeros(2, 4)[1].index_copy_(0, INDEX, ONES),
        lambda: torch.zeros(2, 4)[1].__setitem__(INDEX, 1.0),
    ),
    "atomic sum": (
        lambda: torch.zeros(4).index_add(0, INDEX, ONES),
        lambda: torch.zeros(4).index_put_((INDEX,), ONES, accumulate=True),
    ),
    "broadcast operand": (lambda: torch.ones(1, 1).expand(4, 3) @ torch.ones(3, 2),),
    "long sums": (
        lambda: torch.bmm(torch.empty(1, 16, 2**15, device="meta"), torch.empty(1, 2**15, 16, device="meta")),
    ),
    "no huge tensor": (lambda: torch.empty(2**16, 2**16, device="meta"),),
    "strided activation": (lambda: _activate(torch.sigmoid), lambda: _activate(torch.tanh)),
    "strided SiLU": (lambda: _activate(F.silu),),
    "layer norm": (lambda: _normalise(torch.rand(2, 3)),),
    "strided attention": (lambda: F.scaled_dot_product_attention(*[torch.ones(2, 3, 5, 4).mT] * 3),),
    "attention of two widths": (lambda: _attend(v_width=3),),
    "causal attention": (lambda: _attend(torch.bfloat16, is_causal=True),),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_violation_is_caught(name: str) -> None:
    for plant in PLANTED[name]:
        with Trace(floor=(0, 0)) as trace:
            plant()
        assert [v for v in trace.violations if v.startswith(f"{name}: ")], trace.names


def test_what_is_right_on_mps_passes() -> None:
    with Trace(floor=(0, 0)) as trace:
        keys = torch.tensor([[3, 1, 2]], dtype=torch.int32)
        torch.argsort(keys.t().contiguous(), dim=-1, stable=True)
        out = torch.zeros(3, 4)
        out[1:, ::2] = torch.ones(2, 2)
        out.scatter_(0, INDEX[None], ONES[None])
        (out * out.argmax(-1)[:, None]).amax()
        _attend(is_causal=True)
        _normalise(torch.rand(2, 3, requires_grad=True))
    assert not trace.violations


def test_rules_end_with_the_torch_that_fixed_them() -> None:
    assert {rule.name for rule in RULES} == {*PLANTED, "on the device"}
    every, later = rules_from((2, 11)), rules_from((2, 13))
    assert set(later) < set(every) == set(RULES)
    assert all(rule.fixed_in is None for rule in later)
    assert all(rule.source for rule in RULES)
