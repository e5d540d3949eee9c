"""`python -m jaxplan`: the command `jaxplan`, where the folder that pip puts it into is not on the path."""

import sys

from jaxplan.cli import main

if __name__ == "__main__":
    sys.exit(main())
