"""`.ci/pythons` finds interpreters by running them."""

import os
import subprocess
from pathlib import Path

import pytest

COMMAND = Path(__file__).parents[1] / ".ci" / "pythons"


def python(path, version):
    """A program that answers as a Python of this version; None is a shim that does not run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    answer = f"echo {version}" if version else "echo 'command not found' >&2; exit 127"
    path.write_text(f"#!/bin/sh\n{answer}\n")
    path.chmod(0o755)
    return str(path)


def found(tmp_path):
    tools = {Path(p) for p in ("/usr/bin", "/bin") if Path(p).is_dir()}
    for tool in ("bash", "seq", "awk", "sort", "ls", "env", "sh"):
        (where,) = [p / tool for p in sorted(tools) if (p / tool).exists()][:1]
        (tmp_path / "bin" / tool).symlink_to(where)
    environment = {"PATH": str(tmp_path / "bin"), "PYENV_ROOT": str(tmp_path / "pyenv")}
    return subprocess.run(
        [COMMAND], env=environment, capture_output=True, text=True, check=False, cwd=os.sep
    )


def test_the_newest_is_found_beside_shims_that_do_not_run(tmp_path):
    oldest = python(tmp_path / "bin" / "python3.11", "3 11 7")
    python(tmp_path / "bin" / "python3.14", None)
    python(tmp_path / "bin" / "python3", "3 10 1")
    python(tmp_path / "pyenv/versions/3.12.1/bin/python", "3 12 1")
    newest = python(tmp_path / "pyenv/versions/3.13.0/bin/python", "3 13 0")
    run = found(tmp_path)
    assert (run.returncode, run.stdout.split()) == (0, [oldest, newest])


@pytest.mark.parametrize("only", ["3 11 7", "3 12 1"])
def test_one_alone_is_an_error(tmp_path, only):
    python(tmp_path / "bin" / "python3", only)
    run = found(tmp_path)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == (
        f"pythons: found {only.replace(' ', '.')}; "
        "expected 3.11, for the oldest jax, and a newer one\n"
    )
