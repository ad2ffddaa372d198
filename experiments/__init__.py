"""One file a claim. Run one with ``python -m experiments.<name> --help``."""
