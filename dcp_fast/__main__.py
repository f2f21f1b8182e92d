"""Entry point of ``python -m dcp_fast``."""

import sys

from dcp_fast.cli import main

sys.exit(main())
