"""The command line."""

import experiments.ches_percentiles as lab
from experiments.protocol import running

main = running.command_of(lab)

if __name__ == "__main__":
    main()
