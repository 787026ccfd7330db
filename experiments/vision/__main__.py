"""``python -m experiments.vision``; see main.py."""

import sys

from experiments.vision.main import main

if __name__ == "__main__":
    sys.exit(main())
