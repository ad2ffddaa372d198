"""Who may import whom, read from the imports themselves."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# A room may import what stands left of it. `runs` stands apart.
LINE = (
    "data",
    "models",
    "logprobs",
    "losses",
    "gradients",
    "embeddings",
    "diagnostics",
    "training",
    "score",
)
APART = ("runs",)
BELOW = ("plain",)  # imports nothing of the package, and all may import it
OUTER = ("experiments", "notebooks", "benchmarks")


def module_name(path: pathlib.Path) -> str:
    """``jaxpref.losses.pairwise``; of a package's ``__init__``, the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: pathlib.Path, source: str | None = None) -> set[str]:
    """Absolute names of all that a file imports, also inside functions."""
    found = set()
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(source or path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def room(name: str) -> str | None:
    """``losses`` of ``jaxpref.losses.dpo``; nothing of another package's name or of `jaxpref`."""
    parts = name.split(".")
    return parts[1] if parts[0] == "jaxpref" and len(parts) > 1 else None


def is_program(name: str) -> bool:
    """Whether ``experiments.x`` is run by itself; files beside it may be its parts."""
    place = ROOT.joinpath(*name.split(".")[:2])
    file = place.with_suffix(".py")
    return (place / "__main__.py").exists() or (
        file.exists() and 'if __name__ == "__main__":' in file.read_text()
    )


def faults(path: pathlib.Path, source: str | None = None) -> list[str]:
    """What a file imports and may not, in words."""
    top, own = path.relative_to(ROOT).parts[0], room(module_name(path))
    own_program = module_name(path).split(".")[:2]
    found = []
    for name in sorted(imports(path, source)):
        first, other = name.split(".")[0], room(name)
        if first == "tests" and top != "tests":
            found.append(f"imports {name}: nothing imports tests")
        elif first in OUTER and top == "jaxpref":
            found.append(f"imports {name}: the library knows nothing of {first}")
        elif first in OUTER and top in OUTER and name.split(".")[:2] != own_program:
            if first != top or is_program(name):
                found.append(f"imports {name}: programs do not import one another")
        elif own is None or other is None or other == own or other in BELOW:
            continue
        elif own in BELOW:
            found.append(f"imports {name}: {own} imports nothing of the package")
        elif own in APART or other in APART:
            found.append(f"imports {name}: {' and '.join(APART)} stands apart")
        elif other not in LINE[: LINE.index(own)]:
            found.append(f"imports {name}: {other} is not left of {own}")
    return found


def files(*folders: str) -> list[pathlib.Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", files("jaxpref", *OUTER), ids=module_name)
def test_imports_come_from_the_left_only(path):
    assert not faults(path)


def test_every_module_has_a_place_in_the_line():
    rooms = {room(module_name(path)) for path in files("jaxpref")} - {None}
    assert rooms <= {*LINE, *APART, *BELOW}, (
        "give the new module a place in LINE, here and in the docs"
    )


def test_the_line_is_the_one_that_the_package_tells():
    told = (ROOT / "jaxpref" / "__init__.py").read_text()
    assert " -> ".join(LINE) in " ".join(told.split())


@pytest.mark.parametrize(
    ("place", "source", "fault"),
    [
        ("jaxpref/losses/x.py", "from jaxpref import training", "training is not left of losses"),
        ("jaxpref/losses/x.py", "from jaxpref.gradients.gram import f", "is not left of losses"),
        ("jaxpref/losses/x.py", "from ..models import decoder", None),
        ("jaxpref/losses/x.py", "from .. import embeddings", "is not left of losses"),
        ("jaxpref/losses/x.py", "from . import pairwise", None),
        ("jaxpref/losses/x.py", "import jaxpref.logprobs", None),
        ("jaxpref/data/x.py", "def f():\n    import jaxpref.losses", "is not left of data"),
        ("jaxpref/runs.py", "from jaxpref import data", "runs stands apart"),
        ("jaxpref/training/x.py", "from jaxpref import runs", "runs stands apart"),
        ("jaxpref/logprobs/x.py", "from jaxpref import plain", None),
        ("jaxpref/plain.py", "from jaxpref import data", "plain imports nothing"),
        ("jaxpref/training/x.py", "import tests.toy", "nothing imports tests"),
        ("jaxpref/training/x.py", "import experiments.a", "library knows nothing"),
        ("experiments/a.py", "from experiments import no_vs_never", "not import one another"),
        ("experiments/a.py", "from experiments.no_vs_never import report", "not import one"),
        ("experiments/a.py", "from benchmarks import frameworks", "not import one another"),
        ("experiments/no_vs_never/a.py", "from experiments.no_vs_never import report", None),
        ("experiments/a.py", "from jaxpref import runs, training", None),
        ("experiments/a.py", "from tests import toy", "nothing imports tests"),
    ],
)
def test_the_reader_finds_faults(place, source, fault):
    found = faults(ROOT / place, source)
    assert (len(found) == 1 and fault in found[0]) if fault else not found
