"""The command line."""

import experiments.displacement as lab
from experiments import common


def main() -> None:
    """The command line."""
    common.command_of(lab)


if __name__ == "__main__":
    main()
