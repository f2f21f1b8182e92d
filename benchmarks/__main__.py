"""Entry point of ``python -m benchmarks``."""

import sys

from benchmarks import prelude

# Ranks that write checkpoints import this module as well, under another name. They use no devices.
if __name__ == "__main__":
    prelude.run()
    from benchmarks.cli import main

    sys.exit(main())
