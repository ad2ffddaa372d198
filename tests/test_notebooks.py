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


@pytest.fixture(scope="module")
def executed(tiny_model, tmp_path_factory):
    """The code cells of every notebook, executed one after the other in one kernel.

    The kernel knows the tiny model and leaves no files behind. Before each notebook it forgets
    every name, and keeps what it has imported and compiled.
    """
    import nbclient
    import nbformat

    folder, forget = tmp_path_factory.mktemp("kernel"), nbformat.v4.new_code_cell("%reset -f")
    before = [path.read_bytes() for path in NOTEBOOKS]
    books = {path.stem: read(path) for path in NOTEBOOKS}
    whole = nbformat.v4.new_notebook()
    whole.cells = [cell for book in books.values() for cell in (forget.copy(), *book.cells)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXPREF_MODEL", str(tiny_model))
        patch.setenv("JUPYTER_PLATFORM_DIRS", "1")  # no warning about the old places
        for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
            patch.setenv(name, str(folder / name.lower()))
        nbclient.NotebookClient(
            whole, timeout=600, kernel_name="python3", allow_errors=True,
            resources={"metadata": {"path": str(ROOT)}},
        ).execute()  # fmt: skip
    assert [path.read_bytes() for path in NOTEBOOKS] == before
    return {
        name: [cell for cell in book.cells if cell.cell_type == "code"]
        for name, book in books.items()
    }


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_whole(path, executed):
    cells = executed[path.stem]
    first = cells[0].execution_count
    assert [cell.execution_count for cell in cells] == list(range(first, first + len(cells)))
    outputs = [output for cell in cells for output in cell.outputs]
    errors = ["\n".join(output["traceback"]) for output in outputs if "traceback" in output]
    assert not errors, errors[0]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no figure"
    printed = "".join(o["text"] for o in outputs if o.get("name") == "stdout")
    assert SAYS[path.stem] in printed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_small(path):
    assert path.stat().st_size < 200_000
    for cell in read(path).cells:
        assert not cell.get("outputs")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_one_cell_that_sets_the_pair(path):
    found = [cell.source for cell in read(path).cells if cell.source.startswith("PAIR = ")]
    assert len(found) == 1
