"""What a GPU will be asked, dry: tiny, in the interpreter."""

from gpu.row_checks import Sizes, checks
from gpu.row_launches import Heads

TINY = Sizes(
    device="cpu",
    models={"tiny": Heads(heads=2, kv_heads=1, dim=16, window=20, has_sinks=True)},
    formats=("int8 rows",),
    rows=(1, 2),
    hidden=128,
    features=16,
    sequences=2,
    positions=40,
    vocabulary=300,
    is_timed=False,
)


def test_all_checks_pass() -> None:
    found = list(checks(TINY))
    assert len(found) == 8
    assert all(check.is_right for check in found), found
