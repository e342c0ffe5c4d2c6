"""`LearnableVQ` in both backends: fitting, moving averages, metrics, and that all of it is state."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

import jax_vq
import torch_ref
from jax_vq.nn.quantizer import EmaState
from parity_tests.codebooks import (
    BATCH,
    LENGTH,
    N_CODE,
    N_HEAD,
    WIDTH,
    Array,
    Backend,
    assert_rows_are_among,
    backend_of,
    lloyd_step,
    padding,
    vectors,
)
from parity_tests.support import assert_close, to_jax, to_numpy
from vq_common import TransformerConfig, oracle
from vq_common.tolerances import relative_rms


@pytest.fixture(params=["jax", "torch"])
def backend(request: pytest.FixtureRequest, torch_device: torch.device) -> Backend:
    return backend_of(request.param, torch_device)


def config(**changes: Any) -> TransformerConfig:
    sizes: dict[str, Any] = {"d_model": N_HEAD * WIDTH, "n_head": N_HEAD, "n_code": N_CODE, "c_dead": 0.0}
    return TransformerConfig(**sizes | changes)


@nnx.jit
def _call(module: Any, x: Any, mask: Any) -> Any:
    return module(x, mask)


class Quantizer:
    """A `LearnableVQ` of one backend, from NumPy arrays to NumPy arrays."""

    def __init__(self, backend: Backend, *, is_jit: bool = True, seed: int = 0, **changes: Any):
        self.backend, self.config = backend, config(**changes)
        if backend.ops is jax_vq:
            self.module: Any = jax_vq.LearnableVQ(self.config, rngs=nnx.Rngs(seed))
        else:
            torch.manual_seed(seed)
            self.module = torch_ref.LearnableVQ(self.config).to(backend.array(np.zeros(1)).device)
        self.run = _call if is_jit and backend.ops is jax_vq else lambda module, x, mask: module(x, mask)

    def __call__(self, x: Array, mask: Array | None = None) -> Any:
        found = self.run(self.module, self.backend.array(x, self.config.dtype), self.backend.array(mask))
        return found._replace(
            **{name: to_numpy(getattr(found, name)) for name in ("codebook", "codes", "vectors", "loss")},
            metrics=type(found.metrics)(*(float(value) for value in found.metrics)),
        )

    def set_state(self, count: Array, total: Array) -> None:
        """A fitted state."""
        array = partial(self.backend.array, dtype="float64" if self.config.dtype == "float64" else "float32")
        if self.backend.ops is jax_vq:
            self.module.count[...], self.module.sum[...] = array(count), array(total)
            self.module.is_fitted[...] = jnp.asarray(True)
        else:
            self.module.count.copy_(array(count))
            self.module.sum.copy_(array(total))
            self.module.is_fitted.fill_(True)

    @property
    def state(self) -> tuple[Array, Array, bool]:
        is_fitted = self.module.is_fitted
        count, total = self.module.state
        return to_numpy(count), to_numpy(total), bool(is_fitted[...])


def test_before_any_fit_codes_are_random_vectors(backend: Backend) -> None:
    quantizer = Quantizer(backend, n_code=64)
    quantizer.module.eval()
    codebook = to_numpy(quantizer.module.codebook)
    assert np.isfinite(codebook).all()
    # Of the length of queries and keys: D ** 0.25, here over 192 vectors of width 5.
    assert 0.9 < np.sqrt((codebook**2).sum(-1).mean()) / WIDTH**0.25 < 1.1
    found = quantizer(np.random.default_rng(0).normal(size=(2, 500, N_HEAD, WIDTH)))
    assert found.metrics.usage > 0.8
    assert found.metrics.entropy > np.log(64) / 2


def test_eval_mode_changes_nothing(backend: Backend) -> None:
    quantizer = Quantizer(backend)
    quantizer.module.eval()
    before = quantizer.state
    first, second = quantizer(vectors(0)), quantizer(vectors(0))
    for old, new in zip(before, quantizer.state, strict=True):
        np.testing.assert_array_equal(old, new)
    assert not quantizer.state[2]
    np.testing.assert_array_equal(first.codes, second.codes)


def test_a_view_in_eval_mode_leaves_the_module_in_training() -> None:
    module = jax_vq.LearnableVQ(config(), rngs=nnx.Rngs(0))
    x = to_jax(vectors(0), "float32")
    before = np.asarray(module.sum[...])
    _call(nnx.view(module, use_running_average=True), x, None)
    np.testing.assert_array_equal(np.asarray(module.sum[...]), before)
    _call(module, x, None)
    assert (np.asarray(module.sum[...]) != before).all()


@pytest.mark.parametrize("codebook_init", ["kmeans", "data"])
def test_the_first_training_batch_fits_the_codebook(backend: Backend, codebook_init: str) -> None:
    """After a batch that is all padding, which fits nothing; later batches do not fit again."""
    quantizer = Quantizer(backend, codebook_init=codebook_init)
    before = quantizer.state
    quantizer(vectors(0), np.zeros((BATCH, LENGTH), bool))
    for old, new in zip(before, quantizer.state, strict=True):
        np.testing.assert_array_equal(old, new)

    x, mask = vectors(1, "float32"), padding("some")
    assert mask is not None
    found = quantizer(x, mask)
    assert quantizer.state[2]
    if codebook_init == "data":
        assert_rows_are_among(found.codebook, x[mask])
    else:
        assert found.metrics.relative_error < 0.5
        again = lloyd_step(x[mask], found.codebook)
        assert relative_rms(again, found.codebook) < 0.1
    after = quantizer.state
    other = -10 * vectors(2, "float32")
    codes = oracle.nearest_codes(other, after[1] / after[0][:, :, None])
    expected = oracle.ema_update(*after[:2], other, codes, np.zeros_like(after[0]), decay=0.99, threshold=0.0)
    quantizer(other)
    assert_close(quantizer.state[0], expected.count, "float32")
    assert_close(quantizer.state[1], expected.sum, "float32")


@pytest.mark.float64
@pytest.mark.parametrize("kind", ["none", "some", "all"])
def test_what_a_call_returns(backend: Backend, kind: str) -> None:
    """Codes, vectors, loss and metrics are those of the codebook before the update."""
    rng = np.random.default_rng(2)
    count, codebook = rng.uniform(0.5, 2, size=(N_HEAD, N_CODE)), rng.normal(size=(N_HEAD, N_CODE, WIDTH))
    quantizer = Quantizer(backend, dtype="float64", param_dtype="float64")
    quantizer.set_state(count, codebook * count[:, :, None])
    x, mask = vectors(3), padding(kind)
    found = quantizer(x, mask)

    codes = oracle.nearest_codes(x, codebook)
    quantized = oracle.take_codes(codebook, codes)
    assert_close(found.codebook, codebook, "float64")
    np.testing.assert_array_equal(found.codes, codes)
    assert_close(found.vectors, quantized, "float64")
    assert_close(found.loss, oracle.commitment_loss(x, quantized, mask), "float64")

    real = np.ones(x.shape[:2], bool) if mask is None else mask
    usage, entropy, relative = [], [], []
    for h in range(N_HEAD):
        share = np.bincount(codes[real][:, h], minlength=N_CODE) / max(real.sum(), 1)
        usage.append((share > 0).mean())
        entropy.append(-sum(p * np.log(p) for p in share if p > 0))
        size = np.sqrt((x[real][:, h] ** 2).sum())
        relative.append(np.sqrt(((x - quantized)[real][:, h] ** 2).sum()) / size if size else 0.0)
    np.testing.assert_allclose(found.metrics, np.mean([usage, entropy, relative], axis=1), rtol=1e-12)

    draws = np.zeros((N_HEAD, N_CODE))
    expected = oracle.ema_update(
        count, codebook * count[:, :, None], x, codes, draws, decay=0.99, threshold=0, mask=mask
    )
    assert_close(quantizer.state[0], expected.count, "float64")
    assert_close(quantizer.state[1], expected.sum, "float64")


def test_half_precision_vectors_keep_a_float32_state(backend: Backend) -> None:
    quantizer = Quantizer(backend, dtype="bfloat16")
    found = quantizer(vectors(0, "bfloat16"))
    quantizer(vectors(1, "bfloat16"))
    assert str(quantizer.module.codebook.dtype).endswith("float32")
    assert found.metrics.relative_error < 0.5
    assert np.isfinite(quantizer.state[1]).all()


def test_a_dead_code_is_revived_and_stays_alive(backend: Backend) -> None:
    quantizer = Quantizer(backend, c_dead=0.1, c_gamma=0.9)
    count, codebook = np.ones((N_HEAD, N_CODE)), np.random.default_rng(0).normal(size=(N_HEAD, N_CODE, WIDTH))
    codebook[:, 2], count[:, 2] = 1e3, 0.05
    quantizer.set_state(count, codebook * count[:, :, None])
    x = vectors(1, "float32")
    quantizer(x)
    revived = to_numpy(quantizer.module.codebook)[:, 2]
    np.testing.assert_array_equal(quantizer.state[0][:, 2], 1)
    assert_rows_are_among(revived[:, None], x.reshape(-1, N_HEAD, WIDTH))
    found = quantizer(x)  # the revived code is used, and moves by its average: it is not drawn again
    assert all(2 in found.codes[:, :, h] for h in range(N_HEAD))
    expected = oracle.ema_update(
        np.ones((N_HEAD, N_CODE)),
        found.codebook,
        x,
        found.codes.astype(int),
        np.zeros((N_HEAD, N_CODE)),
        decay=0.9,
        threshold=0.0,
    )
    assert_close(quantizer.state[0][:, 2], expected.count[:, 2], "float32")
    assert_close(quantizer.state[1][:, 2], expected.sum[:, 2], "float32")


def test_the_error_falls_in_training(backend: Backend) -> None:
    """On vectors around five centres, from a draw of vectors with decay 0.8."""
    quantizer = Quantizer(backend, codebook_init="data", c_gamma=0.8, c_dead=0.1)
    errors = [quantizer(vectors(step, "float32")).metrics.relative_error for step in range(30)]
    assert np.mean(errors[-5:]) < 0.7 * errors[0]


def test_codebooks_are_state_and_not_parameters() -> None:
    in_torch = torch_ref.VQAttentionQK(config())
    names = {f"quantizer_{x}.{name}" for x in "qk" for name in ("count", "sum", "is_fitted")}
    assert {name for name, _ in in_torch.named_buffers()} == names
    assert not any("quantizer" in name for name, _ in in_torch.named_parameters())

    in_jax = jax_vq.VQAttentionQK(config(), rngs=nnx.Rngs(0))
    state = nnx.to_flat_state(nnx.state(in_jax, EmaState))
    assert {".".join(map(str, path)) for path, _ in state} == names
    assert not any("quantizer" in str(path) for path, _ in nnx.to_flat_state(nnx.state(in_jax, nnx.Param)))


@pytest.mark.standard_promotion
def test_an_optimizer_leaves_codebooks_alone() -> None:
    module = jax_vq.VQAttentionQK(config(), rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(module, optax.adamw(0.1, weight_decay=0.5), wrt=nnx.Param)
    before = jax.tree.map(np.asarray, nnx.state(module, EmaState))
    weight = np.asarray(module.q_proj.kernel[...])
    nnx.jit(lambda m, o: o.update(m, jax.tree.map(jnp.ones_like, nnx.state(m, nnx.Param))))(module, optimizer)
    assert (np.asarray(module.q_proj.kernel[...]) != weight).all()
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(module, EmaState))


@pytest.mark.parametrize("codebook_init", ["kmeans", "data"])
def test_jit_updates_the_state_as_eager_does(codebook_init: str) -> None:
    plain, jitted = (
        Quantizer(Backend(jax_vq, to_jax), is_jit=is_jit, codebook_init=codebook_init, c_dead=0.5)
        for is_jit in (False, True)
    )
    for step in range(3):
        x = vectors(step, "float32")
        eager, compiled = plain(x), jitted(x)
        np.testing.assert_array_equal(eager.codes, compiled.codes)
        assert_close(compiled.loss, eager.loss, "float32")
        for one, other in zip(plain.state, jitted.state, strict=True):
            assert_close(other, one, "float32")
    assert jitted.state[2]


def test_torch_draws_differ_between_calls_and_repeat_with_the_seed(torch_device: torch.device) -> None:
    backend = backend_of("torch", torch_device)
    first, same, other = (Quantizer(backend, seed=seed, codebook_init="data") for seed in (0, 0, 1))
    for quantizer, seed in ((first, 0), (same, 0), (other, 1)):
        torch.manual_seed(seed)
        quantizer(vectors(0, "float32"))
    np.testing.assert_array_equal(first.state[1], same.state[1])
    assert (first.state[1] != other.state[1]).any()
