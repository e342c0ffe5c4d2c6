"""What the machine is: processor, free memory, versions, commit. Imports no framework."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

PACKAGES = ("numpy", "jax", "jaxlib", "flax", "torch")
# Compiler options for programs whose time does not matter: on a GPU each product is tried in many ways else.
NO_AUTOTUNING = {"xla_gpu_autotune_level": 0}
ROOT = Path(__file__).resolve().parent.parent


def is_installed(package: str) -> bool:
    """Whether a package can be imported; it is not."""
    return importlib.util.find_spec(package) is not None


def fast_compile_flags() -> str:
    """XLA_FLAGS for programs that are compiled often and run for milliseconds, of the jaxlib installed.

    Unoptimized code compiles many times faster. jaxlib 0.11 has no other emitters to switch off, and
    ends the process at a flag it does not know.
    """
    flags = "--xla_backend_optimization_level=0"
    if is_installed("jaxlib") and _release("jaxlib") < (0, 11):
        flags += " --xla_cpu_use_fusion_emitters=false"
    return flags


def has_nvidia_gpu() -> bool:
    """Whether the machine shows an NVIDIA GPU, whatever a framework sees."""
    return os.path.exists("/dev/nvidia0") or shutil.which("nvidia-smi") is not None


def _release(package: str) -> tuple[int, int]:
    major, minor = importlib.metadata.version(package).split(".")[:2]
    return int(major), int(minor)


def cpu_name() -> str:
    """Model of the processor and number of cores, as 'AMD EPYC, 2 cores'."""
    model = _proc_value("/proc/cpuinfo", "model name") or _sysctl("machdep.cpu.brand_string")
    return f"{model or platform.processor() or platform.machine()}, {n_core()} cores"


def free_bytes() -> int:
    """Memory that processes can still take: what the system has, or less where a container limits it."""
    available = _proc_value("/proc/meminfo", "MemAvailable")
    free = int(available.split()[0]) * 1024 if available else int(_sysctl("hw.memsize") or 0) // 2
    limit, used = (_cgroup_value(name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        free = min(free, max(limit - used, 0))
    return free


def versions(packages: Iterable[str] = PACKAGES) -> str:
    """'python=3.11.9 numpy=2.1.0 ...', of what is installed."""
    found = [f"python={platform.python_version()}"]
    for name in packages:
        try:
            found.append(f"{name}={importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return " ".join(found)


def commit() -> str:
    """The commit that runs, '+dirty' when tracked files differ from it.

    The environment's VQ_COMMIT goes first, for a copy without the history; 'unknown' where nothing tells.
    """
    if os.environ.get("VQ_COMMIT"):
        return os.environ["VQ_COMMIT"]
    is_clone = _git("rev-parse", "--show-toplevel") == str(ROOT)
    head = _git("rev-parse", "--verify", "--quiet", "HEAD") if is_clone else ""
    if not head:
        return "unknown"
    return head + ("+dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str:
    return _output("git", "-C", str(ROOT), *arguments)


def _sysctl(name: str) -> str:
    return _output("sysctl", "-n", name) if platform.system() == "Darwin" else ""


def _output(*command: str) -> str:
    """What a command prints, '' when it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _proc_value(path: str, key: str) -> str:
    return _first_value(_lines(path), key)


def _first_value(lines: Iterable[str], key: str) -> str:
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def _cgroup_value(name: str) -> int | None:
    text = "".join(_lines(f"/sys/fs/cgroup/{name}")).strip()
    return int(text) if text.isdigit() else None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def n_core() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
