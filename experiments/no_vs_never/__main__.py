"""The command line."""

import experiments.no_vs_never as lab
from experiments import common


def main() -> None:
    """The command line."""
    common.command_of(lab)


if __name__ == "__main__":
    main()
