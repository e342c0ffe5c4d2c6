"""How much memory a call takes of the system, as the system sees it."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROCESS = Path("/proc/self")


def growth(call: Callable[[], Any], folder: Path = PROCESS) -> int | None:
    """Bytes by which the resident set of this process grows while `call` runs, at its highest.

    Call once before, so that what is set up once is not counted. What an allocator kept of earlier
    calls is given back first where the C library can, or it would be taken again unseen.

    Returns:
      None where the system does not tell: no Linux, or the peak cannot be reset.
    """
    gc.collect()
    _give_back()
    try:
        (folder / "clear_refs").write_text("5", encoding="ascii")  # proc(5): the peak is now the present size
        before = _peak_bytes(folder)
    except OSError:
        return None
    result = call()
    after = _peak_bytes(folder)
    del result
    return max(after - before, 0)


def _peak_bytes(folder: Path) -> int:
    lines = (folder / "status").read_text(encoding="ascii", errors="replace").splitlines()
    line = next((line for line in lines if line.startswith("VmHWM:")), None)
    if line is None:
        raise OSError(f"{folder / 'status'} has no VmHWM")
    return 1024 * int(line.split()[1])


def _give_back() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
