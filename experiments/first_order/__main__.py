"""The command line."""

import experiments.first_order as lab
from experiments.protocol import running

main = running.command_of(lab)

if __name__ == "__main__":
    main()
