"""``python -m experiments.lm``; see main.py."""

import sys

from experiments.lm.main import main

if __name__ == "__main__":
    sys.exit(main())
