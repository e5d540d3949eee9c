"""`python -m jaxplan.cli`."""

import sys

from jaxplan.cli import main

if __name__ == "__main__":
    sys.exit(main())
