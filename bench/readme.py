"""Tables of a page, generated between its markers from result files.

`<!-- bench:speed FOLDER BACKEND MECHANISM... -->` begins a table and `<!-- /bench:speed -->` ends
it. FOLDER is relative to the page. What is between the two is this module's alone.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import groups, markdown, sources
from bench.fit import curve_name
from bench.groups import Group
from bench.sources import Source

BEGIN = re.compile(r"<!-- bench:(\w+) (.*?) ?-->\n")
BLOCK = re.compile(r"(<!-- bench:(\w+) (.*?) ?-->\n).*?(<!-- /bench:\2 -->)", re.DOTALL)
CALLS = {"fwd": "one forward call", "bwd": "one backward pass", "fwd+bwd": "one forward and backward pass"}


def rewrite(path: Path) -> str:
    """Generate the tables of a page; a line that says how many, and whether they changed.

    Raises:
      FileNotFoundError, ValueError: there is no such page or result, or a marker is wrong.
    """
    old = path.read_text(encoding="utf-8")
    new = generated(old, path.parent)
    if new != old:
        path.write_text(new, encoding="utf-8")
    n_table = len(BLOCK.findall(new))
    return f"{path}: {n_table} tables from markers, {'rewritten' if new != old else 'nothing changed'}"


def generated(text: str, folder: Path) -> str:
    """A page with what its markers ask for.

    Raises:
      FileNotFoundError, ValueError: a marker is wrong or has no end, or its result is.
    """
    if len(BEGIN.findall(text)) != len(BLOCK.findall(text)):
        raise ValueError("a marker <!-- bench:NAME ... --> has no <!-- /bench:NAME --> of its own")

    def fill(match: re.Match[str]) -> str:
        begin, name, words, end = match.groups()
        return f"{begin}\n{_block(name, words.split(), folder)}\n\n{end}"

    return BLOCK.sub(fill, text)


def _block(name: str, words: Sequence[str], folder: Path) -> str:
    if name not in TABLES:
        raise ValueError(f"no table is called {name!r}, there is {', '.join(TABLES)}")
    if len(words) < 3:
        raise ValueError(f"bench:{name} needs a folder, a backend and mechanisms, found {' '.join(words)!r}")
    path, backend, *mechanisms = words
    source = sources.load(folder / path)
    kept = [r for r in source.records if r["backend"] == backend and r["mechanism"] in (*mechanisms, "exact")]
    missing = {*mechanisms, "exact"} - {record["mechanism"] for record in kept if record["status"] == "ok"}
    if missing:
        raise ValueError(f"{path} has no figure of {', '.join(sorted(missing))} in {backend}")
    found = groups.groups([Source(source.path, tuple(kept))])
    (group, *others) = [group for of_suite in found.values() for group in of_suite]
    if others:
        raise ValueError(
            f"{path} has several devices, dtypes, directions or shapes: one table cannot hold them"
        )
    return TABLES[name](group, path)


def _speed(group: Group, path: str) -> str:
    """Milliseconds of mechanisms beside exact attention, how many times faster, and from where on."""
    curves = [curve for is_causal in reversed(group.forms) for curve in group.curves(is_causal)]
    curves.sort(key=lambda curve: (not curve.is_causal, curve.mechanism != "exact"))
    lengths = sorted({record["length"] for record in group.records})
    head, columns = ["tokens"], []
    for curve in curves:
        name = curve_name(curve.mechanism, curve.is_causal)
        head.append(f"{name}, ms")
        columns.append([*(markdown.milliseconds(curve.ms.get(T)) for T in lengths), ""])
        if curve.mechanism != "exact":
            head.append("times faster")
            values = curve.values(group.faster)
            columns.append([*(markdown.ratio(values.get(T)) for T in lengths), group.crossover(curve)])
    rows = [[f"{T:,}", *(column[i] for column in columns)] for i, T in enumerate(lengths)]
    rows.append(["faster from", *(column[-1] for column in columns)])
    return f"{_caption(group, path)}\n\n{markdown.table(head, rows)}"


def _caption(group: Group, path: str) -> str:
    """What was measured, on what, by which versions."""
    r = group.records[0]
    kernels = dict.fromkeys(x["implementation"] for x in group.records if x["mechanism"] == "exact")
    same, _ = sources.shared(group.records, ("codes_k", "commit", "versions"))
    text = (
        f"Milliseconds of {CALLS.get(r['direction'], r['direction'])} in {r['backend']} on one "
        f"{r['device_name']}: {r['dtype']}, batch {r['batch']}, {r['heads']} heads of width {r['width']}, "
        f"{same.get('codes_k', 'various')} codes, {r['input']} q, k and v; finding the codes is part of a "
        f"call; exact attention is {', '.join(filter(None, kernels))} ([records]({path}), commit "
        f"{str(same.get('commit', 'various'))[:7]}, {same.get('versions', 'various versions')})."
    )
    missing = [x for x in group.records if x["status"] != "ok"]
    if missing:
        points = (f"{curve_name(x['mechanism'], x['is_causal'])} at {x['length']:,}" for x in missing)
        text += f" Without a figure: {', '.join(points)}."
    return text


TABLES: dict[str, Callable[[Group, str], str]] = {"speed": _speed}
