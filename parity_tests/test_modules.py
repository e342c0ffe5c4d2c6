"""The four modules: oracle, jax and torch from one file of weights; gradients; training; basic usage."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import yaml
from flax import nnx
from safetensors.numpy import load_file

import jax_vq
import torch_ref
from jax_vq.nn.quantizer import EmaState
from parity_tests.modules import (
    CASES,
    HYPER,
    Inputs,
    expected_output,
    inputs,
    jax_call,
    jax_module,
    make_config,
    torch_module,
    write_weights,
)
from parity_tests.support import assert_close, to_jax, to_numpy, to_torch
from vq_common import TransformerConfig, load_config
from vq_common.module_oracle import MECHANISMS
from vq_common.tolerances import relative_rms

CONF = Path(__file__).parents[1] / "conf.yml"
FORWARD = (
    *((name, "float64") for name in CASES if name != "full"),
    ("full_padded", "float32"),
    ("full", "bfloat16"),
    ("causal_padded", "bfloat16"),
)
GRADIENT = (("causal_padded", "float64"), ("full_padded", "float32"), ("window_conv", "float64"))

# Flax's LayerNorm and optax mix dtypes themselves.
pytestmark = pytest.mark.standard_promotion


@pytest.mark.parametrize("name, dtype", FORWARD)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_forward(mechanism: str, name: str, dtype: str, tmp_path: Path, torch_device: torch.device) -> None:
    drawn = inputs(mechanism, name, dtype)
    path = write_weights(tmp_path / "weights", drawn)
    in_jax = jax_module(mechanism, drawn.config, path)
    in_torch = torch_module(mechanism, drawn.config, path, device=torch_device)
    in_jax.eval()
    in_torch.eval()
    x, extra = drawn.jax()
    out_jax = jax_call(in_jax, x, extra)
    x_torch, extra_torch = drawn.torch(torch_device)
    out_torch = in_torch(x_torch, **extra_torch)

    assert str(out_jax.dtype) == dtype
    assert str(out_torch.dtype) == f"torch.{dtype}"
    expected = expected_output(mechanism, drawn)
    assert_close(out_jax, expected, dtype)
    assert_close(out_torch, expected, dtype)
    assert_close(out_jax, out_torch, dtype)
    if "mask" in extra:
        assert not to_numpy(out_jax)[1].any()
        assert not to_numpy(out_torch)[1].any()


@pytest.mark.parametrize("mechanism", sorted(set(MECHANISMS) - {"HyperAttention"}))
def test_padded_tokens_never_enter(mechanism: str, tmp_path: Path, torch_device: torch.device) -> None:
    """NaN in a padded token reaches its own output alone; HyperAttention still sorts it as a query."""
    drawn = inputs(mechanism, "full_padded", "float32")
    path = write_weights(tmp_path / "weights", drawn)
    mask = drawn.extra["mask"]
    spoilt = drawn._replace(x=np.where(mask[:, :, None], drawn.x, np.nan))
    in_jax = jax_module(mechanism, drawn.config, path)
    in_torch = torch_module(mechanism, drawn.config, path, device=torch_device)
    in_jax.eval()
    in_torch.eval()
    for run in (
        lambda made: jax_call(in_jax, *made.jax()),
        lambda made: in_torch(made.torch(torch_device)[0], **made.torch(torch_device)[1]),
    ):
        clean, dirty = to_numpy(run(drawn)), to_numpy(run(spoilt))
        np.testing.assert_array_equal(dirty[mask], clean[mask])


@pytest.mark.parametrize("name, dtype", GRADIENT)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_gradients(mechanism: str, name: str, dtype: str, tmp_path: Path, torch_device: torch.device) -> None:
    """Of x and of every parameter, through output and commitment loss."""
    drawn = inputs(mechanism, name, dtype)
    path = write_weights(tmp_path / "weights", drawn)
    in_jax = _gradients_in_jax(mechanism, drawn, path)
    in_torch = _gradients_in_torch(mechanism, drawn, path, torch_device)
    for ours, its in zip(in_jax.outputs, in_torch.outputs, strict=True):
        assert_close(ours, its, dtype)
    assert_close(in_jax.x, in_torch.x, dtype, "gradient")
    learned = (".weight", ".bias", "conv_weight", "code_bias")
    assert set(in_torch.parameters) == {key for key in drawn.weights if key.endswith(learned)}
    for key, gradient in in_torch.parameters.items():
        assert gradient.any(), key
        assert_close(in_jax.parameters[key], gradient, dtype, "gradient")


class Gradients(NamedTuple):
    outputs: tuple[Any, ...]  # the module's output, and its commitment loss if it has one
    x: Any
    parameters: dict[str, Any]


def _gradients_in_jax(mechanism: str, drawn: Inputs, path: Path) -> Gradients:
    module = jax_module(mechanism, drawn.config, path)
    module.eval()
    graphdef, parameters, rest = nnx.split(module, nnx.Param, ...)
    x, extra = drawn.jax()
    d_out = to_jax(drawn.d_out, drawn.config.dtype)

    @jax.jit
    def run(parameters: Any, rest: Any, x: Any, extra: Any) -> Any:
        def loss(parameters: Any, x: Any) -> Any:
            outputs = _outputs(nnx.merge(graphdef, parameters, rest), x, extra)
            return _loss(outputs, d_out), outputs

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(parameters, x)

    (of_parameters, of_x), outputs = run(parameters, rest, x, extra)
    saved = path.with_name("gradients")
    jax_vq.save_weights(nnx.merge(graphdef, of_parameters, rest), saved)
    return Gradients(outputs, of_x, load_file(saved))


def _gradients_in_torch(mechanism: str, drawn: Inputs, path: Path, device: torch.device) -> Gradients:
    module = torch_module(mechanism, drawn.config, path, device=device).eval()
    x, extra = drawn.torch(device)
    x.requires_grad_()
    outputs = _outputs(module, x, extra)
    _loss(outputs, to_torch(drawn.d_out, drawn.config.dtype, device)).backward()
    gradients = {name: to_numpy(parameter.grad) for name, parameter in module.named_parameters()}
    return Gradients(outputs, x.grad, gradients)


def _outputs(module: Any, x: Any, extra: dict[str, Any]) -> tuple[Any, ...]:
    if not isinstance(module, jax_vq.VQAttention | torch_ref.VQAttention):
        return (module(x, **extra),)
    out, metrics = module(x, **extra, return_metrics=True)
    return out, metrics.loss


def _loss(outputs: tuple[Any, ...], d_out: Any) -> Any:
    out, *commitment = outputs
    return sum(commitment, start=(out * d_out).sum())


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_no_gradient_reaches_a_codebook(backend: str, tmp_path: Path, torch_device: torch.device) -> None:
    drawn = inputs("VQAttentionQK", "causal", "float32")
    path = write_weights(tmp_path / "weights", drawn)
    if backend == "torch":
        in_torch = torch_module("VQAttentionQK", drawn.config, path, device=torch_device).eval()
        states = [in_torch.quantizer_q.sum, in_torch.quantizer_k.sum, in_torch.quantizer_k.count]
        for state in states:
            state.requires_grad_()
        x, extra = drawn.torch(torch_device)
        _loss(_outputs(in_torch, x, extra), torch.ones_like(x)).backward()
        gradients = [torch.zeros(()) if state.grad is None else state.grad for state in states]
    else:
        in_jax = jax_module("VQAttentionQK", drawn.config, path)
        in_jax.eval()
        x, extra = drawn.jax()
        states = nnx.DiffState(0, nnx.All(EmaState, lambda path, _: path[-1] != "is_fitted"))

        @nnx.jit
        def gradient(module: Any) -> Any:
            return nnx.grad(lambda m: _loss(_outputs(m, x, extra), jnp.ones_like(x)), argnums=states)(module)

        gradients = jax.tree.leaves(gradient(in_jax))
        assert len(gradients) == 4
    for gradient in gradients:
        assert not to_numpy(gradient).any()


@pytest.mark.parametrize("dtype, rtol", [("float64", 1e-10), ("float32", 1e-5)])
def test_ten_steps_of_adamw(dtype: str, rtol: float, tmp_path: Path, torch_device: torch.device) -> None:
    """The same losses, weights and codebooks in both backends. Without dead codes nothing is random."""
    mechanism = "VQAttentionQK"
    drawn = inputs(mechanism, "window_conv", dtype)
    config = dataclasses.replace(drawn.config, c_dead=0.0)
    path = write_weights(tmp_path / "weights", drawn)
    settings: dict[str, Any] = {"eps": 1e-8, "weight_decay": 0.1}
    rate = 1e-3  # no code flips by rounding on the way

    in_jax = jax_module(mechanism, config, path)
    in_jax.train()
    optimizer = nnx.Optimizer(in_jax, optax.adamw(rate, b1=0.9, b2=0.95, **settings), wrt=nnx.Param)
    x, extra = drawn.jax()
    d_out = to_jax(drawn.d_out, dtype)

    @nnx.jit
    def step(module: Any, optimizer: Any) -> Any:
        loss, gradients = nnx.value_and_grad(lambda m: _loss(_outputs(m, x, extra), d_out))(module)
        optimizer.update(module, gradients)
        return loss

    losses_jax = [float(step(in_jax, optimizer)) for _ in range(10)]

    in_torch = torch_module(mechanism, config, path, device=torch_device).train()
    adamw = torch.optim.AdamW(in_torch.parameters(), lr=rate, betas=(0.9, 0.95), **settings)
    x_torch, extra_torch = drawn.torch(torch_device)
    d_out_torch = to_torch(drawn.d_out, dtype, torch_device)
    losses_torch = []
    for _ in range(10):
        adamw.zero_grad()
        loss = _loss(_outputs(in_torch, x_torch, extra_torch), d_out_torch)
        loss.backward()
        adamw.step()
        losses_torch.append(float(loss.detach()))

    np.testing.assert_allclose(losses_jax, losses_torch, rtol=rtol)
    assert len(set(losses_jax)) == 10
    jax_vq.save_weights(in_jax, tmp_path / "jax")
    torch_ref.save_weights(in_torch, tmp_path / "torch")
    after_jax, after_torch = load_file(tmp_path / "jax"), load_file(tmp_path / "torch")
    for name, before in drawn.weights.items():
        assert relative_rms(after_jax[name], after_torch[name]) <= 10 * rtol, name
        assert np.array_equal(after_jax[name], before) == (
            name in ("directions",) or name.endswith("is_fitted")
        )


@pytest.mark.parametrize("backend", ["jax", "torch"])
@pytest.mark.parametrize("mechanism", ["VQAttentionQK", "VQAttention"])
def test_pieces_and_steps_give_what_the_whole_gives(
    mechanism: str, backend: str, tmp_path: Path, torch_device: torch.device
) -> None:
    """With a window, sinks, the convolution and documents; the state of a module has all that is needed."""
    drawn = inputs(mechanism, "window_conv", "float64")
    path = write_weights(tmp_path / "weights", drawn)
    x, segment_ids = drawn.x, drawn.extra["segment_ids"].copy()
    segment_ids[:, 30:] = segment_ids[:, 30:31]  # steps go on in one document
    if backend == "jax":
        module, convert = jax_module(mechanism, drawn.config, path), to_jax
    else:
        module = torch_module(mechanism, drawn.config, path, device=torch_device)
        convert = partial(to_torch, device=torch_device)
    module.eval()
    whole = to_numpy(module(convert(x), segment_ids=convert(segment_ids)))
    state, outs = module.init_state(len(x)), []
    for piece in (slice(0, 3), slice(3, 26), slice(26, 40)):
        out, state = module(
            convert(x[:, piece]), segment_ids=convert(segment_ids[:, piece]), state=state, return_state=True
        )
        outs.append(to_numpy(out))
    for t in range(40, x.shape[1]):
        out, state = module.step(convert(x[:, t : t + 1]), state)
        outs.append(to_numpy(out))
    assert_close(np.concatenate(outs, axis=1), whole, "float64")


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_a_packed_document_gives_what_it_gives_alone(
    backend: str, tmp_path: Path, torch_device: torch.device
) -> None:
    """Convolution, rotary positions, window and sinks all start anew."""
    drawn = inputs("VQAttentionQK", "window_conv", "float64")
    path = write_weights(tmp_path / "weights", drawn)
    if backend == "jax":
        module, convert = jax_module("VQAttentionQK", drawn.config, path), to_jax
    else:
        module = torch_module("VQAttentionQK", drawn.config, path, device=torch_device)
        convert = partial(to_torch, device=torch_device)
    module.eval()
    x = drawn.x[:1, :40]
    segment_ids = np.repeat(np.array([[4, 1]], np.int32), (17, 23), axis=1)
    packed = to_numpy(module(convert(x), segment_ids=convert(segment_ids)))
    alone = to_numpy(module(convert(x[:, 17:])))
    assert_close(packed[:, 17:], alone, "float64")


def _changes(config: TransformerConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("block_len", "c_beta", "is_causal")}


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_hyper_attention_draws_its_samples(backend: str, torch_device: torch.device) -> None:
    config, length = make_config("float32", is_causal=True), 53
    x = np.random.default_rng(0).normal(size=(2, length, config.d_model))
    module, run = _callable("HyperAttention", config, backend, torch_device)
    module.eval()
    first, second = run(x), run(x)
    assert np.isfinite(first).all()
    assert (first != second).any()
    ids = to_numpy(module.draw_samples(17, length))
    sizes = jax_vq.sample_set_sizes(length, config.is_causal, HYPER["min_seq_len"])
    assert ids.shape == (17, len(sizes), HYPER["n_sample"], config.n_head)
    for r, size in enumerate(sizes):
        np.testing.assert_array_equal(np.unique(ids[:, r]), np.arange(size))


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_dropout(backend: str, torch_device: torch.device) -> None:
    """In train mode an output is dropped or divided by 1 - p, so the mean stays; in eval mode nothing."""
    rate = 0.4
    config = make_config("float32", p_dropres=rate)
    x = np.random.default_rng(0).normal(size=(3, 61, config.d_model))
    module, run = _callable("MultiHeadAttention", config, backend, torch_device)
    module.eval()
    plain = run(x)
    np.testing.assert_array_equal(run(x), plain)
    module.train()
    first, second = run(x), run(x)
    assert (first != second).any()
    kept = first != 0
    np.testing.assert_allclose(first[kept], plain[kept] / (1 - rate), rtol=1e-6)
    # Five standard deviations of a binomial.
    assert abs(kept.mean() - (1 - rate)) < 5 * (rate * (1 - rate) / kept.size) ** 0.5


def _callable(
    mechanism: str, config: TransformerConfig, backend: str, device: torch.device
) -> tuple[Any, Any]:
    """A new module, and its call from a NumPy array to one."""
    if backend == "jax":
        module = jax_module(mechanism, config)
        return module, lambda x: to_numpy(jax_call(module, to_jax(x, config.dtype), {}))
    torch.manual_seed(0)
    module = torch_module(mechanism, config, device=device)
    return module, lambda x: to_numpy(module(to_torch(x, config.dtype, device)))


@pytest.mark.parametrize("backend", ["jax", "torch"])
@pytest.mark.parametrize("mechanism", ["VQAttentionQK", "HyperAttention"])
def test_input_errors(backend: str, mechanism: str, torch_device: torch.device) -> None:
    module, run = _callable(mechanism, make_config("float32"), backend, torch_device)
    x = np.ones((2, 5, 23))
    with pytest.raises(ValueError, match=r"x must be .* d_model = 23, found \(2, 5, 22\)"):
        run(x[:, :, 1:])
    with pytest.raises(ValueError, match=r"x must have 3 axes, found shape \(5, 23\)"):
        run(x[0])
    with pytest.raises(TypeError, match="x must be one of"):
        run(x.astype(np.int32))
    convert = to_jax if backend == "jax" else partial(to_torch, device=torch_device)
    with pytest.raises(ValueError, match=r"mask must be .*\(2, 4\)"):
        module(convert(x, "float32"), convert(np.ones((2, 4), bool)))
    with pytest.raises(TypeError, match="mask must be boolean"):
        module(convert(x, "float32"), mask=convert(np.ones((2, 5), np.int32)))


def test_float64_needs_x64() -> None:
    config = make_config("float64")
    with jax.enable_x64(False), pytest.raises(ValueError, match="needs jax_enable_x64"):
        jax_vq.MultiHeadAttention(config, rngs=nnx.Rngs(0))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_basic_usage(backend: str, torch_device: torch.device) -> None:
    """The original's example, line by line; a call in train mode, as there."""
    with CONF.open(encoding="utf-8") as file:
        config = yaml.load(file, Loader=yaml.FullLoader)  # noqa: S506 (the call that users make)
    model_config = TransformerConfig(**config)
    assert model_config == load_config(CONF)
    batch_size, seq_len, d_model = 4, 1024, config["d_model"]
    if backend == "jax":
        in_jax = jax_vq.VQAttentionQK(model_config, rngs=nnx.Rngs(0))
        output = in_jax(jax.random.normal(jax.random.key(0), (batch_size, seq_len, d_model), jnp.float32))
    else:
        in_torch = torch_ref.VQAttentionQK(model_config).to(torch_device)
        output = in_torch(torch.randn(batch_size, seq_len, d_model, device=torch_device))
    assert tuple(output.shape) == (4, 1024, 1024)
    assert str(output.dtype).endswith("float32")
    assert np.isfinite(to_numpy(output)).all()
