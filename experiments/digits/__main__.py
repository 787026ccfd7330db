"""``python -m experiments.digits``; see main.py."""

import sys

from experiments.digits.main import main

if __name__ == "__main__":
    sys.exit(main())
