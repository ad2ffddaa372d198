"""The command line."""

import functools

import experiments.loss_comparison as lab
from experiments.protocol import running

main = functools.partial(running.command_of, lab)

if __name__ == "__main__":
    main()
