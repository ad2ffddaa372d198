"""Public functions say what they take, what comes back and, where they are formulas, their source.

Public are the functions that a room's ``__init__`` names; of a room that names none, those of all
its files. A leading underscore, on a function or on a file, makes private.
"""

import importlib
import inspect
import pkgutil
import re
import types
import typing

import jax
import pytest

import jaxpref

# Rooms of formulas: each function is somebody's, or says whose it is.
FORMULAS = ("losses", "gradients", "embeddings", "diagnostics", "logprobs")


def functions_of(module):
    found = {k: v for k, v in vars(module).items() if inspect.isfunction(v) and k[0] != "_"}
    return {k: v for k, v in found.items() if v.__module__.startswith(module.__name__)}


def public_functions():
    """Every public function by the name that a user calls it by."""
    found = {}
    for room in pkgutil.iter_modules(jaxpref.__path__, "jaxpref."):
        module = importlib.import_module(room.name)
        places = [module]
        if room.ispkg and not functions_of(module):
            files = pkgutil.iter_modules(module.__path__, f"{room.name}.")
            names = [f.name for f in files if not f.name.rpartition(".")[2].startswith("_")]
            places = [importlib.import_module(name) for name in names]
        for place in places:
            found |= {f"{place.__name__}.{k}": v for k, v in functions_of(place).items()}
    return found


FUNCTIONS = public_functions()


def section(text, title):
    """The lines under ``title:``, or nothing."""
    found = re.search(rf"^{title}:(.*?)(?=^\S|\Z)", text, re.DOTALL | re.MULTILINE)
    return found[1].strip() if found else ""


def lacks(name, function):
    """What a docstring lacks, in words that say what to write."""
    text, signature = inspect.getdoc(function) or "", inspect.signature(function)
    formula = name.split(".")[1] in FORMULAS
    missing = []
    if not re.match(r"\S.*[.:](\n\n|\n?\Z)", text):
        missing.append("a first line that is one sentence, then an empty line")
    arguments = [k for k in signature.parameters if not k.startswith("_")]
    told = section(text, "Args")
    # A single argument of a helper is what its first line speaks of.
    if formula or len(arguments) > 1:
        heads = re.findall(r"^ *([\w*, `]+):", told, re.MULTILINE)
        named = {word for head in heads for word in re.findall(r"\w+", head)}
        missing += [f"'{k}: ...' under Args:" for k in arguments if k not in named]
        if signature.return_annotation is not None and not section(text, "(Returns|Yields)"):
            missing.append("Returns: (or the annotation '-> None')")
    if formula and not section(text, "References") and not section(text, "Source"):
        missing.append("References: (authors, year, equation, link) or Source: (whose idea it is)")
    return missing


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_are_documented(name):
    assert not lacks(name, FUNCTIONS[name]), f"the docstring of {name} lacks this"


def either(hint):
    """The types of a union, or the one type."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


@pytest.mark.parametrize("name", [k for k in FUNCTIONS if k.split(".")[1] in FORMULAS])
def test_arrays_have_shapes_in_the_signature(name):
    hints = typing.get_type_hints(FUNCTIONS[name])
    bare = [k for k, hint in hints.items() if jax.Array in either(hint)]
    assert not bare, f"{name}: expected Float[Array, 'axes'] or its like for these, not Array"


def test_the_reader_finds_what_is_missing():
    def whole(x, y):
        """One line.

        Args:
            x: This.
            y: That.

        Returns:
            The sum.

        Source: here.
        """

    def half(x, y):
        """One line.

        Args:
            x: This.
        """

    assert not lacks("jaxpref.losses.whole", whole)
    assert [m[:6] for m in lacks("jaxpref.losses.half", half)] == ["'y: ..", "Return", "Refere"]
    assert len(lacks("jaxpref.data.half", half)) == 2
    assert {"jaxpref.losses.dpo", "jaxpref.data.files.read_pairs"} <= set(FUNCTIONS)
