"""``python -m fxquant``: the command line."""

import sys

from fxquant.cli import main

sys.exit(main())
