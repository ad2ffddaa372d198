"""`experiments.dose` on a tiny model."""

import dataclasses

import numpy as np
import pytest
import smoke
from test_protocol import written

import experiments.dose as lab
from experiments.dose import protocol

pytestmark = pytest.mark.usefixtures("as_optax_needs_it")


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """A finished run of the command: its settings, folder and what it printed."""
    cwd = tmp_path_factory.mktemp("made")
    config = dataclasses.replace(
        lab.SMOKE, model=str(tiny_model), data=written(cwd), limit=40, seeds=1
    )
    return config, *smoke.command(lab, config, cwd)


def test_a_run_leaves_everything_behind(made):
    config, folder, printed = made
    arrays = dict(np.load(folder / "arrays.npz"))
    assert len(protocol.doses(config)) == 12
    for dose in protocol.doses(config):
        assert arrays[f"{dose}_change"].shape == (1, 2, 5, 2)
    # More of the same from the same start goes further; another start is another course.
    small, large = (np.abs(arrays[f"dpo_0_{rate}_change"]).mean() for rate in ("0.0001", "0.001"))
    assert large > 3 * small
    gap = arrays["dpo_1_0.001_change"] - arrays["dpo_0_0.001_change"]
    assert np.abs(gap).max() > 1e-3
    assert lab.report(config, lab.summarise(config, arrays)) in printed
    assert "Too small for a verdict: " in printed
    assert (folder / "figure.png").stat().st_size > 10_000


@pytest.mark.usefixtures("any_size")
def test_the_least_dose_that_displaces_is_named():
    """A world in which unseen pairs fall by ten thousand times rate times updates, but for one."""
    config = dataclasses.replace(lab.SMOKE, resamples=20, seeds=2, rates=(1e-4, 1e-3), starts=(0,))
    arrays = {"lengths": np.full((2, 5, 2), 3)}
    for dose in protocol.doses(config):
        falls = dose.arm == "dpo" and dose.rate > 1e-4
        looks = np.array(protocol.looks(config), float)[None, :, None, None]
        change = np.tile(-looks * dose.rate * 1e4 if falls else looks * 0.1, (2, 1, 5, 2))
        arrays |= {f"{dose}_change": change, f"{dose}_diverged": np.array([-1, -1])}
    said = lab.report(config, lab.summarise(config, arrays))
    assert "displaced, below their start and below both controls, at 2 of 4 doses" in said
    assert "2 updates at 0.001 after 0 epochs of supervision, -20.00" in said
    lab.draw(config, arrays)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"rates": ()}, "rates"), ({"starts": (1, 1)}, "each once"), ({"rates": (0.0,)}, "above 0")],
)
def test_what_cannot_be_run_is_refused(made, change, said):
    with pytest.raises(ValueError, match=said):
        lab.load(dataclasses.replace(made[0], **change))
