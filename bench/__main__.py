"""``python -m bench``: the command line from a source tree that was never installed."""

from bench.cli import main

if __name__ == "__main__":
    main()
