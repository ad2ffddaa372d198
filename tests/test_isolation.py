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

LIST_MODULES = """
import importlib, json, sys
import jax, jax.numpy, jaxtyping, numpy
before = set(sys.modules)
importlib.import_module(sys.argv[1])
after = set(sys.modules)
print(json.dumps({
    "own": sorted(name for name in after if name.startswith("jaxpref.")),
    "added": sorted({name.partition(".")[0] for name in after - before}),
    "all": sorted({name.partition(".")[0] for name in after}),
}))
"""


@pytest.fixture(scope="module")
def loaded():
    """For each light module, what a fresh interpreter holds after importing it."""
    root = pathlib.Path(jaxpref.__file__).parent.parent
    command = [sys.executable, "-c", LIST_MODULES]
    running = {
        name: subprocess.Popen([*command, f"jaxpref.{name}"], stdout=subprocess.PIPE, cwd=root)
        for name in LIGHT
    }
    found = {}
    for name, process in running.items():
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, f"import jaxpref.{name} failed"
        found[name] = json.loads(output)
    return found


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


def test_the_probe_sees_what_a_heavy_room_loads():
    root = pathlib.Path(jaxpref.__file__).parent.parent
    command = [sys.executable, "-c", LIST_MODULES, "jaxpref.models.decoder"]
    output = subprocess.run(command, capture_output=True, check=True, cwd=root, timeout=300).stdout
    assert "flax" in json.loads(output)["added"]
