"""The notebook runs as committed, and is committed without outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from bench.host import ROOT

TOUR = ROOT / "notebooks" / "tour.ipynb"


def test_it_is_committed_without_outputs() -> None:
    notebook = nbformat.read(TOUR, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.id for cell in code if cell.outputs or cell.execution_count is not None] == []


@pytest.mark.slow
def test_it_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a reader runs it: in a kernel of its own, from its folder; a cell that raises fails here."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    notebook = nbformat.read(TOUR, as_version=4)
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(TOUR.parent)}}).execute()
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    said = {name: "".join(out.get("text", "") for out in of_cell) for name, of_cell in outputs.items()}
    assert said["modules"].count("differ by") == 4
    assert "streamed and whole differ by" in said["streaming"]
    assert any("image/png" in out.get("data", {}) for out in outputs["curves"])
