"""The light core: `jaxpref.losses` and its like load only jax, numpy and jaxtyping."""

import json
import pathlib
import pkgutil
import subprocess
import sys

import pytest

import jaxpref

# What jax, numpy and jaxtyping load themselves.
ALLOWED = {
    "jax",
    "jaxlib",
    "jaxtyping",
    "ml_dtypes",
    "numpy",
    "opt_einsum",
    "scipy",
    "wadler_lindig",
}
LIGHT = [
    name
    for name in ("losses", "gradients", "embeddings", "diagnostics")
    if name in {module.name for module in pkgutil.iter_modules(jaxpref.__path__)}
]

# One interpreter; a process is forked from it for each module, so that none sees another's imports.
LIST_MODULES = """
import importlib, json, os, sys
import jax, jax.numpy, jaxtyping, numpy
before = set(sys.modules)
for module in sys.argv[1:]:
    if os.fork():
        assert os.wait()[1] == 0, f"import {module} failed"
        continue
    importlib.import_module(module)
    after = set(sys.modules)
    print(json.dumps({module: {
        "own": sorted(name for name in after if name.startswith("jaxpref.")),
        "added": sorted({name.partition(".")[0] for name in after - before}),
        "all": sorted({name.partition(".")[0] for name in after}),
    }}), flush=True)
    break
"""
HEAVY = "models.decoder"


@pytest.fixture(scope="module")
def loaded():
    """For each module, what a fresh process holds after importing it."""
    root = pathlib.Path(jaxpref.__file__).parent.parent
    names = [f"jaxpref.{name}" for name in (*LIGHT, HEAVY)]
    done = subprocess.run(
        [sys.executable, "-c", LIST_MODULES, *names],
        stdout=subprocess.PIPE, check=True, cwd=root, timeout=300,
    )  # fmt: skip
    found = {}
    for line in done.stdout.splitlines():
        found |= json.loads(line)
    return {name.partition(".")[2]: each for name, each in found.items()}


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_add_nothing_to_jax_numpy_and_jaxtyping(loaded, name):
    added = set(loaded[name]["added"]) - set(sys.stdlib_module_names) - ALLOWED
    assert added == {"jaxpref"}


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_load_no_heavy_package(loaded, name):
    heavy = {"flax", "gguf", "matplotlib", "optax", "orbax", "tensorflow", "tokenizers"}
    heavy |= {"tensorflow_datasets", "torch", "tqdm", "transformers", "tyro", "wandb"}
    assert not heavy & set(loaded[name]["all"])


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_load_no_models_and_no_data(loaded, name):
    rooms = {module.split(".")[1] for module in loaded[name]["own"]}
    assert rooms <= {*LIGHT, "plain"}


def test_the_probe_sees_what_a_heavy_room_loads(loaded):
    assert "flax" in loaded[HEAVY]["added"]
