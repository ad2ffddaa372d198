"""What the tests of experiments share: the command at smoke size, and a run that was killed."""

import contextlib
import dataclasses
import importlib
import io
import shutil
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest


def command(lab, config, cwd):
    """Runs the command in a folder, settings as flags: the run's folder and what it printed."""
    experiment = lab.__name__.rpartition(".")[2]
    flags = []
    for field in dataclasses.fields(config):
        if (value := getattr(config, field.name)) != field.default:
            values = value if isinstance(value, tuple) else (value,)
            flags += [f"--{field.name.replace('_', '-')}", *map(str, values)]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [experiment, "--name", "tiny", *flags])
        importlib.import_module(f"{lab.__name__}.__main__").main()
    plt.close("all")
    return cwd / "runs" / experiment / "tiny", out.getvalue()


@contextlib.contextmanager
def compiled_once(module):
    """Its `programs` depend on settings and shapes alone: the runs of a file share them."""
    kept, make = {}, module.programs

    def programs(*arguments):
        key = tuple(getattr(each, "digest", each) for each in arguments if _decides(each))
        if key not in kept:
            kept[key] = make(*arguments)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "programs", programs)
        yield


def _decides(argument):
    """Of a policy, which is another object each time, the pairs tell the model's shapes."""
    return not hasattr(argument, "unembedding")


def same_after_a_kill(lab, config, folder, new, lost):
    """Runs again in a new folder that has all parts but the lost ones: the same files and bits."""
    parts = sorted((folder / "parts").iterdir())
    assert {*lost} < {part.stem for part in parts}
    (new / "parts").mkdir()
    for part in parts:
        if part.stem not in lost:
            shutil.copy(part, new / "parts")
    again, once = lab.run(config, new), dict(np.load(folder / "arrays.npz"))
    assert again.keys() == once.keys()
    for name in once:
        np.testing.assert_array_equal(again[name], once[name], err_msg=name)
    assert sorted(part.name for part in (new / "parts").iterdir()) == [x.name for x in parts]
