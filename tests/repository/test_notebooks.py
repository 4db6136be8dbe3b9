"""The notebooks: text and notebook are one, and each runs from a clean kernel."""

import pytest

from tests.support.paths import REPOSITORY

jupytext = pytest.importorskip("jupytext")
nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

FOLDER = REPOSITORY / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
TRAIN = "03", "04", "06"  # numbers of those that train models: half a minute to two


def test_there_are_six_with_their_texts():
    assert [path.stem for path in NOTEBOOKS] == sorted(path.stem for path in FOLDER.glob("*.py"))
    assert len(NOTEBOOKS) == 6


def shown(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=pytest.mark.slow if path.stem.startswith(TRAIN) else ())
        for path in NOTEBOOKS
    ],
    ids=lambda path: path.stem,
)
def test_runs_and_equals_its_text(path):
    """The committed outputs have a picture and no error, and so has a run from a clean kernel."""
    notebook = nbformat.read(path, as_version=4)
    text = jupytext.read(path.with_suffix(".py"))
    cells = [(cell.cell_type, cell.source) for cell in notebook.cells]
    assert cells == [(cell.cell_type, cell.source) for cell in text.cells]
    assert notebook.metadata.kernelspec.name == "python3"
    committed = shown(notebook)
    assert any("image/png" in output.get("data", {}) for output in committed)
    assert not any(output.output_type == "error" for output in committed)
    where = {"metadata": {"path": FOLDER}}
    # Raises with the cell and its traceback.
    nbclient.NotebookClient(notebook, timeout=300, resources=where).execute()
    assert any("image/png" in output.get("data", {}) for output in shown(notebook))
