"""Entry point of ``python -m dcp_fast``."""

import sys

from dcp_fast.tools.cli import main

sys.exit(main())
