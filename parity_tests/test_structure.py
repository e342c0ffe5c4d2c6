"""The mirror: both backends have the same files, names and signatures, and neither needs the other."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
BACKENDS = ("jax_vq", "torch_ref")


def files_of(package: str) -> list[str]:
    return sorted(path.relative_to(ROOT / package).as_posix() for path in (ROOT / package).rglob("*.py"))


# GPU kernels, and what chooses them, are JAX's alone.
KERNELS = tuple(file for file in files_of("jax_vq") if file.startswith("kernels/"))
EXPORTED_BY_JAX = {"why_xla"}
ONLY_IN_JAX = (*KERNELS, "ops/implementations.py")
FILES = [file for file in files_of("jax_vq") if file not in ONLY_IN_JAX]
LONGEST_FILE = 375  # lines; about 300 is the aim

# What one backend has and the other has no use for: (backend, file): {name: why}.
ONLY_IN: dict[tuple[str, str], dict[str, str]] = {
    ("jax_vq", "nn/hyper_attention.py"): {"HashDirections": "a Variable type; torch has buffers"},
    ("jax_vq", "nn/quantizer.py"): {
        "EmaState": "a Variable type; torch has buffers",
        "LearnableVQ.set_view": "nnx.view asks every module which settings it takes",
    },
    ("jax_vq", "ops/attention.py"): {"exact_implementation": "torch chooses its kernel itself"},
    ("jax_vq", "ops/checks.py"): {"check_x64": "float64 is always there in torch"},
    ("jax_vq", "ops/quantize.py"): {
        "nearest_codes(implementation)": "there are kernels of JAX alone",
        "scores_by_terms": "for the speed of JAX on a GPU; the reference is plain",
    },
    ("jax_vq", "ops/vq_attention.py"): {
        "vq_attention(implementation)": "there are kernels of JAX alone",
        "vq_attention_step(implementation)": "there are kernels of JAX alone",
    },
    ("jax_vq", "ops/vq_blocks.py"): {
        "Form(implementation)": "there are kernels of JAX alone",
        "Form(is_whole)": "there are kernels of JAX alone",
    },
    ("jax_vq", "ops/numerics.py"): {
        "precision_for": "a JAX product names its precision",
        "row_major": "XLA chooses how arrays lie in memory",
        "split": "for `scores_by_terms` and the kernels",
    },
    ("torch_ref", "ops/checks.py"): {
        "check_device": "JAX moves arrays itself or refuses to",
        "shape": "a torch shape prints its type",
    },
}

BLOCKED = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError(f"{{name}} is absent")
sys.meta_path.insert(0, Absent())
{code}
assert not {{name.split(".")[0] for name in sys.modules}} & {blocked}
"""
RUN_TORCH = """
import torch, torch_ref
q, codes = torch.rand(2, 7, 3, 4), torch.rand(3, 5, 4)
assert torch_ref.vq_attention(q, q, q, codes, codes, is_causal=True).shape == q.shape
config = torch_ref.TransformerConfig(d_model=12, n_head=3, n_code=5, block_len=4)
assert torch_ref.VQAttentionQK(config)(torch.rand(2, 7, 12)).shape == (2, 7, 12)
"""
RUN_JAX = """
import jax.numpy as jnp, jax_vq, numpy as np
from flax import nnx
random = np.random.default_rng(0)
q, codes = (jnp.asarray(random.random(shape), "float32") for shape in ((2, 7, 3, 4), (3, 5, 4)))
assert jax_vq.vq_attention(q, q, q, codes, codes, is_causal=True).shape == q.shape
config = jax_vq.TransformerConfig(d_model=12, n_head=3, n_code=5, block_len=4)
module = jax_vq.VQAttentionQK(config, rngs=nnx.Rngs(0))
module.eval()
assert module(jnp.ones((2, 7, 12), "float32")).shape == (2, 7, 12)
"""
RUN_COMMON = """
import pkgutil, importlib, vq_common
for module in pkgutil.iter_modules(vq_common.__path__):
    importlib.import_module(f"vq_common.{module.name}")
assert vq_common.load_config("conf.yml").n_head >= 1
"""
JAX, TORCH = {"jax", "jaxlib", "flax", "optax", "jax_vq"}, {"torch", "torch_ref"}


def load(backend: str, file: str) -> ModuleType:
    parts = [backend, *Path(file).with_suffix("").parts]
    return importlib.import_module(".".join(parts).removesuffix(".__init__"))


def defined(module: ModuleType) -> dict[str, Any]:
    """Public functions and classes of a file, in the order in which it defines them."""
    tree = ast.parse(inspect.getsource(module))
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return {name: getattr(module, name) for name in names if not name.startswith("_")}


def members(cls: type) -> dict[str, Any]:
    """What a class body itself defines: public functions and properties, its constructor, its call."""
    names = {"forward": "__call__"}
    found = {names.get(name, name): value for name, value in vars(cls).items()}
    kinds = (FunctionType, property, classmethod, staticmethod)
    return {
        name: getattr(cls, name, value) if isinstance(value, classmethod | staticmethod) else value
        for name, value in found.items()
        if isinstance(value, kinds) and (not name.startswith("_") or name in ("__init__", "__call__"))
    }


def own_bases(cls: type) -> list[str]:
    return [base.__name__ for base in cls.__mro__ if base.__module__.startswith(BACKENDS)]


def parameters(function: Any) -> list[tuple[str, str, Any]]:
    if isinstance(function, property):
        function = function.fget
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.kind.name, p.default) for p in found]


def allowed(backend: str, file: str, prefix: str = "") -> set[str]:
    names = ONLY_IN.get((backend, file), {})
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


def named_in(file: str, name: str) -> set[str]:
    """Parameters of a function, or fields of a tuple, that it has in JAX alone."""
    prefix = f"{name}("
    return {only.removesuffix(")") for only in allowed("jax_vq", file, prefix)}


def functions(file: str) -> Iterator[tuple[str, Any, Any]]:
    """Name and the two implementations of every public function and method of a file."""
    mine, its = (defined(load(backend, file)) for backend in BACKENDS)
    for name in mine.keys() & its.keys():
        if not inspect.isclass(mine[name]):
            yield name, mine[name], its[name]
        elif not issubclass(mine[name], tuple):
            pair = members(mine[name]), members(its[name])
            yield from (
                (f"{name}.{key}", pair[0][key], pair[1][key]) for key in pair[0].keys() & pair[1].keys()
            )


def test_both_backends_have_the_same_files() -> None:
    assert (
        sorted(str(path.relative_to(ROOT / "torch_ref")) for path in (ROOT / "torch_ref").rglob("*.py"))
        == FILES
    )
    folders = {Path(file).parent.as_posix() for file in FILES}
    assert {".", "ops", "nn"} <= folders


def test_both_backends_export_the_same_names() -> None:
    mine, its = (importlib.import_module(backend) for backend in BACKENDS)
    assert [name for name in mine.__all__ if name not in EXPORTED_BY_JAX] == its.__all__
    assert all(package.__all__ == sorted(package.__all__) for package in (mine, its))
    assert set(mine.__all__) >= EXPORTED_BY_JAX
    assert all(hasattr(package, name) for package in (mine, its) for name in package.__all__)


@pytest.mark.parametrize("file", FILES)
def test_a_file_defines_the_same_names_in_the_same_order(file: str) -> None:
    mine, its = (defined(load(backend, file)) for backend in BACKENDS)
    for backend, found, other in (("jax_vq", mine, its), ("torch_ref", its, mine)):
        assert found.keys() - other.keys() == {n for n in allowed(backend, file) if n.isidentifier()}
    assert [name for name in mine if name in its] == [name for name in its if name in mine]


@pytest.mark.parametrize("file", FILES)
def test_classes_have_the_same_members(file: str) -> None:
    mine, its = (defined(load(backend, file)) for backend in BACKENDS)
    for name in mine.keys() & its.keys():
        if not inspect.isclass(mine[name]):
            continue
        fields = [getattr(cls, "_fields", ()) for cls in (mine[name], its[name])]
        assert [field for field in fields[0] if field not in named_in(file, name)] == list(fields[1])
        bases = [
            [base.__name__ for base in cls.__mro__ if base.__module__.startswith(BACKENDS)]
            for cls in (mine[name], its[name])
        ]
        assert bases[0] == bases[1]
        jax_only, torch_only = members(mine[name]).keys(), members(its[name]).keys()
        assert jax_only - torch_only == allowed("jax_vq", file, f"{name}.")
        assert torch_only - jax_only == allowed("torch_ref", file, f"{name}.")


@pytest.mark.parametrize("file", FILES)
def test_functions_have_the_same_signatures(file: str) -> None:
    """Names, order, kinds and defaults; a module's `rngs` is JAX's alone."""
    for name, mine, its in functions(file):
        expected = parameters(its)
        if name.endswith(".__init__"):
            expected = [*expected, ("rngs", "KEYWORD_ONLY", inspect.Parameter.empty)]
        only = named_in(file, name)
        found = parameters(mine)
        assert only <= {parameter for parameter, *_ in found}
        assert [parameter for parameter in found if parameter[0] not in only] == expected, name


@pytest.mark.parametrize("file", FILES)
def test_docstrings(file: str) -> None:
    """All that is public has one; both backends raise the same errors for the same reasons."""
    for backend in BACKENDS:
        tree = ast.parse((ROOT / backend / file).read_text(encoding="utf-8"))
        public = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        public = [node for node in public if not node.name.startswith("_")]
        assert ast.get_docstring(tree), f"{backend}/{file}"
        assert [node.name for node in public if not ast.get_docstring(node)] == [], f"{backend}/{file}"
    for name, mine, its in functions(file):
        assert raises(mine) == raises(its), f"{file}: {name}"
        assert name.endswith(".__init__") or (mine.__doc__ and its.__doc__), f"{file}: {name}"


def raises(function: Any) -> str:
    """The 'Raises' section of a docstring."""
    section = re.search(r"\n *Raises:\n(.*?)(?=\n *\n|\Z)", function.__doc__ or "", re.DOTALL)
    return " ".join(section[1].split()) if section else ""


@pytest.mark.parametrize("file", FILES)
def test_what_checks_its_arguments_says_what_it_raises(file: str) -> None:
    for name, *pair in functions(file):
        if file == "ops/checks.py" or name.startswith("check_") or name.endswith(".__init__"):
            continue
        for function in pair:
            if isinstance(function, FunctionType) and checks(function):
                assert raises(function), f"{function.__module__}.{name}"


def checks(function: FunctionType) -> bool:
    """Whether a function raises itself or calls something named as the argument checks are."""
    tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(function)))
    calls = [
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    return any(isinstance(node, ast.Raise) for node in ast.walk(tree)) or any(
        re.match(r"_?check_|as_(array|floats|integers)$", call) for call in calls
    )


@pytest.mark.parametrize(
    "blocked, code",
    [(JAX, RUN_TORCH), (TORCH, RUN_JAX), (JAX | TORCH, RUN_COMMON)],
    ids=["torch", "jax", "common"],
)
def test_a_backend_runs_without_the_other(blocked: set[str], code: str) -> None:
    script = BLOCKED.format(blocked=blocked, code=code)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


PACKAGES = (*BACKENDS, "vq_common", "bench")
SOURCES = [f"{package}/{file}" for package in PACKAGES for file in files_of(package)]
# The command line.
TALKS = {f"bench/{name}.py" for name in ("__main__", "arguments", "progress", "runner", "worker")}
TALKS |= {f"bench/suites/{name}.py" for name in ("compare", "parity", "report")}


@pytest.mark.parametrize("file", SOURCES)
def test_source(file: str) -> None:
    """Short files, and nothing that stops or, off the command line, prints."""
    source = (ROOT / file).read_text(encoding="utf-8")
    assert len(source.splitlines()) <= LONGEST_FILE
    names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    assert not names & {"breakpoint", "pdb", "exec", "eval"}
    assert "print" not in names or file in TALKS
