"""`python -m dynamo`, and the console script `dynamo`."""

import sys

from core.cli import main as run


def main() -> None:
    """Run the command line and exit with its code."""
    sys.exit(run())


if __name__ == "__main__":
    main()
