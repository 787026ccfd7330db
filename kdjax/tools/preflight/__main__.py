"""``python -m kdjax.tools.preflight``."""

import sys

from kdjax.tools.preflight._command import main

if __name__ == "__main__":
    sys.exit(main())
