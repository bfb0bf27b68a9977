"""Every family through the whole engine, from files: transformers is the oracle."""

import pytest

from engines import GOLDEN
from families import ALIKE
from golden import STEPS, TOLERANCE, compare


@pytest.mark.parametrize("family", GOLDEN)
def test_prefill_and_decode_equal_transformers(family, tmp_path):
    """`make golden` takes all steps with all families."""
    are_equal, worst = compare(family, tmp_path, steps=8 if family in ALIKE else STEPS)
    assert are_equal
    assert worst <= TOLERANCE, f"{family}: {worst:.1e}"
