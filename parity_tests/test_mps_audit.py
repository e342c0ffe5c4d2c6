"""What the float32 path of `torch_ref` asks of MPS, traced on the CPU and held against `mps_rules`."""

import dataclasses
import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import torch_ref
from parity_tests.mps_trace import Trace, tensors_in

B, T, S, H, D, V, C, P, N = 2, 17, 13, 3, 8, 5, 11, 4, 6
CONFIG = torch_ref.TransformerConfig(d_model=24, n_head=3, d_k=8, d_v=5, n_code=7, block_len=4, p_dropres=0.1)
Scenario = Callable[..., None]


class Inputs:
    """Random inputs; with `is_view`, each is a transposed slice of a larger tensor."""

    def __init__(self, is_view: bool):
        self.is_view = is_view
        self.random = torch.Generator().manual_seed(0)

    def floats(self, *shape: int) -> Tensor:
        """A leaf that asks for its gradient."""
        return self._laid_out(torch.rand(shape, generator=self.random) * 2 - 1).requires_grad_()

    def uniform(self, *shape: int) -> Tensor:
        return self._laid_out(torch.rand(shape, generator=self.random))

    def ids(self, size: int, *shape: int) -> Tensor:
        return self._laid_out(torch.randint(size, shape, generator=self.random, dtype=torch.int32))

    def mask(self, length: int, is_padded: bool) -> Tensor | None:
        return self._laid_out(torch.rand(B, length, generator=self.random) > 0.3) if is_padded else None

    def qkv(self, k_len: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.floats(B, T, H, D), self.floats(B, k_len, H, D), self.floats(B, k_len, H, V)

    def _laid_out(self, x: Tensor) -> Tensor:
        if not self.is_view:
            return x
        return torch.cat([x[:1], x]).transpose(0, 1).contiguous().transpose(0, 1)[1:]


def differentiate(*results: Any) -> None:
    """Backward of a loss whose gradient is no broadcast scalar, as a plain sum's would be."""
    out = [x for x in tensors_in(results) if x.requires_grad]
    torch.stack([x.square().sum() for x in out]).sum().backward()


def vq_attention(make: Inputs, is_causal: bool, is_padded: bool) -> None:
    k_len = T if is_causal else S
    for codebook_q in (make.uniform(H, C, D), None):
        q, k, v = make.qkv(k_len)
        mask, codebook_k = make.mask(k_len, is_padded), make.uniform(H, C + 2, D)
        out = torch_ref.vq_attention(
            q, k, v, codebook_q, codebook_k, is_causal=is_causal, mask=mask, block_len=4
        )
        differentiate(out)


def exact_and_coded(make: Inputs, is_causal: bool, is_padded: bool) -> None:
    """Documents, grouped heads and a bias; causal also a window, sinks and a state."""
    n_head, mask = 2 * H, make.mask(T, is_padded)
    for codebook_q in (make.uniform(n_head, C, D), None):
        arrays: list[Any] = [make.floats(B, T, n_head, D), make.floats(B, T, H, D), make.floats(B, T, H, V)]
        arrays += [codebook_q, make.uniform(H, C + 2, D)]
        bias, ids = make.floats(1, n_head)[0], make.ids(2, B, T)
        both_ways: dict[str, Any] = {"mask": mask, "segment_ids": ids, "code_bias": bias}
        if not is_causal:
            differentiate(torch_ref.vq_attention(*arrays, **both_ways))
            continue
        for mem_len, n_sink in ((3, 2), (0, 2), (4, 0)):
            form = {"block_len": 4, "mem_len": mem_len, "n_sink": n_sink}
            local: dict[str, Any] = {
                "q_local": make.floats(B, T, n_head, P),
                "k_local": make.floats(B, T, H, P),
                "code_bias": bias,
            }
            state = torch_ref.init_state(B, arrays[4], V, local_width=P, **form)
            out, state = torch_ref.vq_attention_step(*arrays, state, **local, **form)
            again, _ = torch_ref.vq_attention(
                *arrays, **both_ways | local, **form, is_causal=True, state=state, return_state=True
            )
            differentiate(out, again)


def dot_product_attention(make: Inputs, is_causal: bool, is_padded: bool) -> None:
    k_len = T if is_causal else S
    q, k, v = make.qkv(k_len)
    mask = make.mask(k_len, is_padded)
    differentiate(torch_ref.dot_product_attention(q, k, v, is_causal=is_causal, mask=mask))
    differentiate(torch_ref.dot_product_attention(q, k, k, is_causal=is_causal, mask=mask))
    part = torch_ref.dot_product_attention(q, k, v, is_causal=is_causal, mask=mask, return_lse=True)
    differentiate(torch_ref.merge_attention(*part, *part))


def hyper_attention(make: Inputs, is_causal: bool, is_padded: bool) -> None:
    k_len = T if is_causal else S
    q, k, v = make.qkv(k_len)
    sizes = torch_ref.sample_set_sizes(k_len, is_causal, 5)
    assert len(sizes) == torch_ref.n_sample_sets(k_len, is_causal, 5)
    sample_ids = torch.stack([make.ids(size, B, N, H) for size in sizes], 1)
    arguments: dict[str, Any] = {
        "is_causal": is_causal,
        "mask": make.mask(k_len, is_padded),
        "min_seq_len": 5,
    }
    directions = make.uniform(H, P, D) - 0.5
    differentiate(torch_ref.hyper_attention(q, k, v, directions, sample_ids, block_size=4, **arguments))


def hashing(make: Inputs, is_causal: bool, is_padded: bool) -> None:
    rank = torch_ref.angular_hash(make.floats(B, T, H, D), make.uniform(H, P, D) - 0.5)
    assert torch.equal(torch_ref.gray_rank(torch_ref.gray_code(rank)), rank)


def quantization(make: Inputs, is_causal: bool, is_padded: bool) -> None:
    x, mask = make.floats(B, T, H, D), make.mask(T, is_padded)
    state = torch_ref.kmeans(x, make.uniform(H, C), n_iter=2, mask=mask)
    codebook = torch_ref.codebook_of(state)
    codes = torch_ref.nearest_codes(x, codebook)
    quantized = torch_ref.take_codes(codebook, codes)
    differentiate(
        torch_ref.straight_through(x, quantized), torch_ref.commitment_loss(x, quantized, mask=mask)
    )
    # Under 5 vectors a code is dead: some are, some are not.
    torch_ref.ema_update(state, x, codes, make.uniform(H, C), threshold=5.0, mask=mask)


def modules(make: Inputs, is_causal: bool, is_padded: bool) -> None:
    config = dataclasses.replace(CONFIG, is_causal=is_causal)
    with torch.device("cpu"):
        coded = torch_ref.VQAttentionQK(config)
        keys_only = torch_ref.VQAttention(dataclasses.replace(config, codebook_init="data"))
        exact = torch_ref.MultiHeadAttention(config)
        hyper = torch_ref.HyperAttention(config, block_size=4, n_projection=P, n_sample=N, min_seq_len=5)
    mask = make.mask(T, is_padded)
    # As a layer that passes a gradient on and as the first one, which does not.
    inner, first = make.floats(B, T, 24), make.uniform(B, T, 24)
    differentiate(coded(inner, mask=mask, return_metrics=True))
    differentiate(coded.eval()(first, mask=mask))
    differentiate(keys_only(first, mask=mask))
    differentiate(exact(first, mask=mask))
    differentiate(hyper(inner, mask=mask))


# With the bytes of a chunk that give it a few of them: rules look at what slicing leaves.
SCENARIOS: dict[Scenario, int] = {
    vq_attention: 12_000,
    exact_and_coded: 36_000,
    dot_product_attention: 4_000,
    hyper_attention: 4_000,
    hashing: 4_000,
    quantization: 4_000,
    modules: 36_000,
}
NOT_TRACED = {"TransformerConfig", "CodebookState", "VQState", "load_config", "load_weights", "save_weights"}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Scenario:
    """Runs a scenario in small chunks."""

    def run(scenario: Scenario, *arguments: Any) -> None:
        monkeypatch.setattr("torch_ref.ops.numerics.CHUNK_BYTES", SCENARIOS[scenario])
        monkeypatch.setattr("torch_ref.ops.hyper_attention.SCORE_BYTES", SCENARIOS[scenario])
        scenario(*arguments)

    return run


LAYOUTS = ((False, False), (True, False), (True, True))  # is_padded, is_view
TRACED = [
    (scenario, is_causal, *layout)
    for scenario in SCENARIOS
    for is_causal in (False, True)
    for layout in (LAYOUTS if scenario is not modules else ((is_causal, False),))
]


@pytest.mark.parametrize("scenario, is_causal, is_padded, is_view", TRACED)
def test_float32_path(run: Any, scenario: Scenario, is_causal: bool, is_padded: bool, is_view: bool) -> None:
    make = Inputs(is_view)
    with Trace() as trace:
        run(scenario, make, is_causal, is_padded)
    assert not trace.violations, "\n".join(sorted(trace.violations))
    assert len(trace.names) > 5


@pytest.mark.parametrize("is_causal", [False, True], ids=["both_ways", "causal"])
def test_long_sequences(is_causal: bool) -> None:
    """The linear-time ops at the chunk sizes of MPS, without values: nothing too long, nothing too large."""
    length, heads, width, codes, piece = 2**16, 1, 64, 128, 2**12
    n_set = torch_ref.n_sample_sets(length, is_causal, piece)
    with torch.device("meta"):
        q, codebook = torch.empty((1, length, heads, width)), torch.empty((heads, codes, width))
        directions, draws = torch.empty((heads, 7, width)), torch.empty((heads, codes))
        sample_ids = torch.empty((1, n_set, 256, heads), dtype=torch.int32)
    options: list[dict[str, Any]] = [{}, {"mem_len": 512, "n_sink": 16}] if is_causal else [{}]
    with Trace(on="meta") as trace:
        for codebook_q, option in itertools.product((codebook, None), options):
            x = q.clone().requires_grad_()
            out = torch_ref.vq_attention(x, x, x, codebook_q, codebook, is_causal=is_causal, **option)
            if codebook_q is not None:  # else it works on a few tokens at a time
                differentiate(out)
        torch_ref.hyper_attention(q, q, q, directions, sample_ids, is_causal=is_causal, min_seq_len=piece)
        state = torch_ref.kmeans(q, draws, n_iter=1)
        torch_ref.ema_update(state, q, torch_ref.nearest_codes(q, codebook), draws)
    assert not trace.violations, "\n".join(sorted(trace.violations))


def test_every_public_name_is_traced(run: Any) -> None:
    seen, before = set(), sys.gettrace()
    sys.settrace(lambda frame, event, _: seen.add(frame.f_code))
    try:
        for scenario in SCENARIOS:
            run(scenario, Inputs(is_view=False), True, True)
    finally:
        sys.settrace(before)
    public = {name: getattr(torch_ref, name) for name in torch_ref.__all__ if name not in NOT_TRACED}
    codes = {name: getattr(value, "forward", value).__code__ for name, value in public.items()}
    assert [name for name, code in codes.items() if code not in seen] == []


def test_a_tensor_made_without_a_device_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_the_cpu(codes: Tensor, n_code: int) -> Tensor:
        return codes[..., None] == torch.arange(n_code, dtype=codes.dtype)

    monkeypatch.setattr("torch_ref.ops.quantize.is_code", on_the_cpu)
    with Trace() as trace:
        quantization(Inputs(is_view=False), False, False)
    assert [v for v in trace.violations if v.startswith("on the device: arange in torch_ref/ops/quantize.py")]
