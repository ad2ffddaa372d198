"""Every notebook, executed whole."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SAYS = {
    "entanglement": "regime of DPO's first step",
    "losses": "mine at log-ratios 0 and 0: ratio 1.414, IDEAL",
    "no_vs_never": "Displacement (Definition 1)",
    "similarity": "Spearman of score and change",
}


def read(path):
    import nbformat

    return nbformat.read(path, as_version=4)


@pytest.fixture
def kernel_settings(tiny_model, tmp_path, monkeypatch):
    """A kernel that knows the tiny model and leaves no files behind."""
    monkeypatch.setenv("JAXPREF_MODEL", str(tiny_model))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")  # no warning about the old places
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.usefixtures("kernel_settings")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_whole(path):
    import nbclient

    before = path.read_bytes()
    notebook = read(path)
    where = {"metadata": {"path": str(ROOT)}}
    done = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources=where
    ).execute()
    cells = [cell for cell in done.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no figure"
    printed = "".join(o["text"] for o in outputs if o.get("name") == "stdout")
    assert SAYS[path.stem] in printed
    assert path.read_bytes() == before


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_small(path):
    assert path.stat().st_size < 200_000
    for cell in read(path).cells:
        assert not cell.get("outputs")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_one_cell_that_sets_the_pair(path):
    found = [cell.source for cell in read(path).cells if cell.source.startswith("PAIR = ")]
    assert len(found) == 1
