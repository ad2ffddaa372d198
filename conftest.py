"""Strict numerics for every test and doctest; programs are compiled quickly, and once a machine.

Nearly all the time of the suite is the compiler's. With jaxlib 0.9 it leaves most passes out and
makes no fused kernels, in new processes too. `make parity`, and the newest jax in its part of the
suite, compile as users do.
"""

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path

JAXLIB = importlib.metadata.version("jaxlib")


def _machine() -> str:
    """What jax's own key of a compiled program leaves out: the processor's instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = next((x for x in lines if x.startswith(("flags", "Features"))), "")
    except OSError:
        found = ""
    text = " ".join((platform.machine(), platform.processor(), found))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# Read when jax is imported. Version, flags and options are part of jax's key of a program.
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxpref"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE / f"jaxlib-{JAXLIB}-{_machine()}"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
if JAXLIB.startswith("0.9."):
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 2)  # so that what shares work has somebody to share with
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def key():
    return jax.random.key(0)
