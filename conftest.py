"""Strict numerics, devices and markers for every test.

Options (each also an environment variable, which worker processes inherit):
  --torch-device cpu|mps|cuda  (VQ_TORCH_DEVICE)  where the `torch_device` fixture puts tensors;
  --jax-platform cpu|cuda      (VQ_JAX_PLATFORM)  what jax runs on.
A device that is asked for and is not there is an error.

Neither framework has to be installed: what is absent is not configured.
"""

import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from bench import host

# jax reads these when it is imported, and so does every subprocess that a test starts.
STRICT_JAX = {
    "jax_enable_x64": True,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_default_matmul_precision": "highest",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vq_attention")
    group.addoption(
        "--torch-device",
        choices=("cpu", "mps", "cuda"),
        default=os.environ.get("VQ_TORCH_DEVICE", "cpu"),
        help="device of the torch_device fixture",
    )
    group.addoption(
        "--jax-platform",
        choices=("cpu", "cuda"),
        default=os.environ.get("VQ_JAX_PLATFORM", "cpu"),
        help="platform that jax runs on",
    )


def pytest_configure(config: pytest.Config) -> None:
    if importlib.util.find_spec("hypothesis"):
        _configure_hypothesis()
    _configure_jax(config.getoption("--jax-platform"))
    if importlib.util.find_spec("torch"):
        _configure_torch(config.getoption("--torch-device"), is_worker=hasattr(config, "workerinput"))


def _configure_hypothesis() -> None:
    """The same examples in every run, and no time limit on one: the first compiles."""
    from hypothesis import settings

    settings.register_profile("vq_attention", deadline=None, derandomize=True, database=None)
    settings.load_profile("vq_attention")


def _configure_jax(platform: str) -> None:
    settings: dict[str, Any] = {"jax_platforms": "cuda,cpu" if platform == "cuda" else "cpu", **STRICT_JAX}
    os.environ.update({name.upper(): str(value) for name, value in settings.items()})
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if platform == "cpu":
        # The benchmark verifies against the oracle with XLA's own settings.
        os.environ.setdefault("XLA_FLAGS", host.fast_compile_flags())
    if "jax" in sys.modules:  # a pytest plugin came first
        for name, value in settings.items():
            sys.modules["jax"].config.update(name, value)
    if platform == "cuda":
        _require_jax_cuda()


def _require_jax_cuda() -> None:
    """Refuse what jax does with "cuda,cpu" and no CUDA device: run on the CPU without a word."""
    import jax

    try:
        jax.devices("cuda")
    except RuntimeError as error:
        raise pytest.UsageError(f"--jax-platform cuda: jax {jax.__version__}: {error}") from error


def _configure_torch(device: str, *, is_worker: bool) -> None:
    import torch

    if not _torch_has(device):
        raise pytest.UsageError(f"--torch-device {device}: torch {torch.__version__} sees no such device")
    torch.set_num_threads(1 if is_worker else min(4, os.cpu_count() or 1))
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if device == "cuda":
        with warnings.catch_warnings():  # autograd's thread warns once that it makes its own context
            warnings.simplefilter("ignore")
            x = torch.ones((1, 1, 1), device=device, requires_grad=True)
            torch.bmm(x, x).sum().backward()
    if device == "cpu":
        # Also fills torch.empty with NaN, so that reading uninitialised memory shows.
        torch.use_deterministic_algorithms(True)


def _torch_has(device: str) -> bool:
    import torch

    return {"cpu": True, "mps": torch.backends.mps.is_available(), "cuda": torch.cuda.is_available()}[device]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    device = config.getoption("--torch-device")
    on_cuda = {"jax": config.getoption("--jax-platform") == "cuda", "torch": device == "cuda"}
    options = {"jax": "--jax-platform cuda", "torch": "--torch-device cuda"}
    for item in items:
        gpu = item.get_closest_marker("gpu")
        missing = [options[name] for name in (gpu.args or on_cuda) if not on_cuda[name]] if gpu else []
        if missing:
            item.add_marker(pytest.mark.skip(reason=f"needs {' '.join(missing)}"))
        if device == "mps" and _is_float64_on_torch(item):
            item.add_marker(pytest.mark.skip(reason="MPS has no float64"))


def _is_float64_on_torch(item: pytest.Item) -> bool:
    """Whether a test marked float64, or with a parameter 'float64', uses `torch_device`."""
    if item.get_closest_marker("float64"):
        return True
    callspec = getattr(item, "callspec", None)
    parameters = callspec.params.values() if callspec else ()
    return "torch_device" in getattr(item, "fixturenames", ()) and any(
        isinstance(value, str) and value == "float64" for value in parameters
    )


@pytest.fixture(scope="session")
def torch_device(pytestconfig: pytest.Config) -> Any:
    """The `torch.device` that torch parity tests put their tensors on."""
    torch = pytest.importorskip("torch")
    return torch.device(pytestconfig.getoption("--torch-device"))


@pytest.fixture(autouse=True)
def _keep_x64() -> Iterator[None]:
    """Give every test float64 again after one whose worker, inside the test process, switched it."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_enable_x64", STRICT_JAX["jax_enable_x64"])


@pytest.fixture(autouse=True)
def _standard_promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    """Relax dtype promotion for a test marked standard_promotion, and for nothing else."""
    if not request.node.get_closest_marker("standard_promotion"):
        yield
        return
    import jax

    with jax.numpy_dtype_promotion("standard"):
        yield
