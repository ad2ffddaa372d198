"""The command line."""

import functools

import experiments.first_order as lab
from experiments.protocol import running

main = functools.partial(running.command_of, lab)

if __name__ == "__main__":
    main()
