"""Files of weights: written whole or not at all, and checked against a module; for both backends."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from vq_common.fields import nearest_name

Layout = Mapping[str, tuple[tuple[int, ...], str]]  # name -> shape, dtype

# What each type holds without loss, besides itself.
_HOLDS = {
    "float64": ("float32", "bfloat16", "float16"),
    "float32": ("bfloat16", "float16"),
}


def check_weights(path: str | Path, expected: Layout, found: Layout) -> None:
    """Raise one error that lists every name that does not fit.

    Raises:
      ValueError: a name is missing or left over, or a shape differs.
      TypeError: a value would lose precision in the module's type.
    """
    wrong = [f"missing {name}{nearest_name(name, found)}" for name in sorted(expected.keys() - found.keys())]
    wrong += [
        f"left over {name}{nearest_name(name, expected)}" for name in sorted(found.keys() - expected.keys())
    ]
    both = sorted(expected.keys() & found.keys())
    for name in both:
        if tuple(expected[name][0]) != tuple(found[name][0]):
            wrong.append(f"{name} is {tuple(found[name][0])}, the module has {tuple(expected[name][0])}")
    if wrong:
        raise ValueError(f"{path} does not fit the module: " + "; ".join(wrong))
    for name in both:
        mine, its = expected[name][1], found[name][1]
        if mine != its and its not in _HOLDS.get(mine, ()):
            raise TypeError(f"{path}: {name} is {its} and would lose precision in the module's {mine}")


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path to write to: it becomes `path` when the block succeeds, and vanishes when it fails.

    Raises:
      OSError: `path` cannot be written.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: {path.parent} is not a directory")
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
