"""``python -m hf_lema``: the command line.

Responsibility: none but to start `cli.main`.
"""

import sys

from hf_lema.cli import main

if __name__ == "__main__":
    sys.exit(main())
