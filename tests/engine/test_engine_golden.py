"""Every family through the whole engine, from files: transformers is the oracle."""

import pytest

from engines import FAMILIES
from golden import TOLERANCE, compare


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_decode_equal_transformers(family, tmp_path):
    are_equal, worst = compare(family, tmp_path)
    assert are_equal
    assert worst <= TOLERANCE, f"{family}: {worst:.1e}"
