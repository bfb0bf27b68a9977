"""Prints the golden table: each family through the whole engine, against transformers."""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests/support"))

import transformers

from engines import GOLDEN
from golden import STEPS, TOLERANCE, compare


def main() -> int:
    """One Markdown row per family; 1 if one is off."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(
        f"| family | greedy tokens over prefill + {STEPS} steps | largest log-probability error |"
    )
    print("|---|---|---|")
    failed = 0
    for family in sorted(GOLDEN):
        with tempfile.TemporaryDirectory() as folder:
            are_equal, worst = compare(family, Path(folder))
        failed += not are_equal or worst > TOLERANCE
        print(f"| {family} | {'equal' if are_equal else 'DIFFERENT'} | {worst:.1e} |", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
