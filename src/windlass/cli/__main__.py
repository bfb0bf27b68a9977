"""`python -m windlass.cli`, where the script is not installed."""

import sys

from windlass.cli import main

sys.exit(main())
