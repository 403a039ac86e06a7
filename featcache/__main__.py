"""``python -m featcache``."""

import sys

from featcache.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
