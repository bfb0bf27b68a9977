"""`python -m bench.servers`: puts bench/ on the path, as its scripts have."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from servers.main import main

sys.exit(main())
