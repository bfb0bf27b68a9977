"""`python -m bench.peers` or `python bench/peers`: puts bench/ on the path, as its scripts have."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peers.main import main

main()
