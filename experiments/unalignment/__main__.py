"""The command line."""

import experiments.unalignment as lab
from experiments.protocol import running

main = running.command_of(lab)

if __name__ == "__main__":
    main()
