"""The command line."""

import experiments.unalignment as lab
from experiments import common


def main() -> None:
    """The command line."""
    common.command(
        "unalignment",
        lab.Config,
        description=lab.__doc__,
        hashes=lab.hashes,
        run=lab.run,
        summarise=lab.summarise,
        report=lab.report,
        draw=lab.draw,
    )


if __name__ == "__main__":
    main()
