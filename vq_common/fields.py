"""Typed, range-checked dataclass fields: the strictness behind `config.py`.

A field is declared with `integer`, `number`, `flag`, `choice` or `integers`; `validate`
checks every one of them on construction and raises one error that names the key, what was
found and what is allowed.
"""

import contextlib
import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any


def integer(default: int | None, *, low: int = 1) -> Any:
    """An int of at least `low`; a default of None is derived from other fields."""
    return dataclasses.field(default=default, metadata={"kind": "integer", "low": low})


def number(default: float, *, low: float = 0.0, high: float = math.inf) -> Any:
    """A finite number in [low, high]."""
    return dataclasses.field(default=default, metadata={"kind": "number", "low": low, "high": high})


def flag(default: bool) -> Any:
    """True or false."""
    return dataclasses.field(default=default, metadata={"kind": "flag"})


def choice(default: str, options: tuple[str, ...]) -> Any:
    """One of a fixed set of words."""
    return dataclasses.field(default=default, metadata={"kind": "choice", "options": options})


def integers(default: tuple[int, ...], *, low: int = 1) -> Any:
    """A non-empty list of ints of at least `low`, kept as a tuple."""
    return dataclasses.field(default=default, metadata={"kind": "integers", "low": low})


def section(cls: type) -> Any:
    """A nested mapping with its own fields."""
    return dataclasses.field(default_factory=cls, metadata={"kind": "section", "cls": cls})


def nearest_name(name: str, known: Iterable[str]) -> str:
    """', did you mean ...?' for a misspelt name, or '' when nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f", did you mean {near[0]!r}?" if near else ""


def check_names(given: Iterable[Any], known: Iterable[str], where: str) -> None:
    """Raise ValueError for the first name that is not known."""
    known = sorted(known)
    for name in given:
        if not isinstance(name, str) or name not in known:
            hint = nearest_name(str(name), known) or "."
            raise ValueError(f"{where}: unknown key {name!r}{hint} Known keys: {', '.join(known)}")


def validate(instance: Any, where: str) -> None:
    """Check and normalise every declared field of a frozen dataclass, in place."""
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        checked = _checked(f"{where}: {field.name}", value, field.default, field.metadata)
        object.__setattr__(instance, field.name, checked)


def _checked(key: str, value: Any, default: Any, rule: Mapping[str, Any]) -> Any:
    kind = rule["kind"]
    if value is None and default is None:
        return None
    if kind == "integer":
        return _checked_integer(key, value, rule["low"])
    if kind == "number":
        return _checked_number(key, value, rule["low"], rule["high"])
    if kind == "flag":
        if not isinstance(value, bool):
            raise TypeError(f"{key} must be true or false, found {_shown(value)}")
        return value
    if kind == "choice":
        options = rule["options"]
        if not isinstance(value, str) or value not in options:
            hint = nearest_name(str(value), options)
            raise ValueError(f"{key} must be one of {', '.join(options)}, found {_shown(value)}{hint}")
        return value
    if kind == "integers":
        if not isinstance(value, list | tuple) or not value:
            raise TypeError(f"{key} must be a non-empty list of integers, found {_shown(value)}")
        return tuple(_checked_integer(f"{key}[{i}]", item, rule["low"]) for i, item in enumerate(value))
    return _checked_section(key, value, rule["cls"])


def _checked_integer(key: str, value: Any, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{key} must be an integer >= {low}, found {_shown(value)}")
    if value < low:
        raise ValueError(f"{key} must be an integer >= {low}, found {value}")
    return value


def _checked_number(key: str, value: Any, low: float, high: float) -> float:
    allowed = f"a finite number >= {low}" if math.isinf(high) else f"a number in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int | float):
        hint = ""
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                hint = f" (YAML reads it as text: write {float(value)!r})"
        raise TypeError(f"{key} must be {allowed}, found {_shown(value)}{hint}")
    if not (low <= value <= high and math.isfinite(value)):
        raise ValueError(f"{key} must be {allowed}, found {value}")
    return float(value)


def _checked_section(key: str, value: Any, cls: type) -> Any:
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise TypeError(f"{key} must be a mapping of its own keys, found {_shown(value)}")
    check_names(value, (f.name for f in dataclasses.fields(cls)), key)
    return cls(**value)


def _shown(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"
