"""The command line."""

import experiments.ches_percentiles as lab
from experiments import common


def main() -> None:
    """The command line."""
    common.command(
        "ches_percentiles",
        lab.Config,
        description=lab.__doc__,
        hashes=lab.hashes,
        run=lab.run,
        summarise=lab.summarise,
        report=lab.report,
        draw=lab.draw,
        metrics=lab.metrics,
    )


if __name__ == "__main__":
    main()
