"""The command line."""

import experiments.entanglement_dynamics as lab
from experiments import common


def main() -> None:
    """The command line."""
    common.command_of(lab)


if __name__ == "__main__":
    main()
