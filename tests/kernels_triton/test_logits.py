"""What is kept of logits that come in ranges, against all of them at once."""

import pytest
import torch
from gpu.tolerances import TOLERANCES, error

from windlass.decoder.score import begin_scan, scores
from windlass.device.host_memory import HostAllocator
from windlass.kernels.logit_scan import scan_logits
from windlass.kernels.triton.logits import HeadState, scan

VOCABULARY = 4100
RANGES = ((0, 2500), (2500, 4097), (4097, VOCABULARY))


def logits_RV(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    logits = 4 * torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(0))
    return logits.to(dtype)


def scanned(logits: torch.Tensor, targets: torch.Tensor | None = None, cap: float | None = None):
    state = HeadState.begin(len(logits), logits.device)
    for first, end in RANGES:
        scan(state, logits[:, first:end], first, targets_R=targets, cap=cap)
    return state


@pytest.mark.parametrize("cap", [None, 5.0])
def test_greedy_rows(cap: float | None) -> None:
    logits = logits_RV()
    logits[0, 100] = logits[0, 3000] = 40.0  # of equals the first, lanes and ranges apart
    logits[1, 2600] = logits[1, 2100] = 40.0
    state = scanned(logits, cap=cap)
    capped = logits if cap is None else cap * torch.tanh(logits / cap)
    assert state.ids_R.tolist()[:2] == [100, 2100]
    assert state.ids_R[2] == capped[2].argmax()
    assert error(state.tops_R, capped.amax(1)) < TOLERANCES[torch.float32]
    assert (
        error(state.tops_R + state.totals_R.log(), capped.logsumexp(1)) < TOLERANCES[torch.float32]
    )


def test_log_probabilities_of_targets() -> None:
    targets = [3, 4098, 2499]
    logits = logits_RV()
    state = scanned(logits, torch.tensor(targets))
    want = begin_scan(HostAllocator(), len(targets), torch.tensor(targets))
    for first, end in RANGES:
        scan_logits(want, logits[:, first:end].clone(), first)
    assert error(state.logprobs(), scores(want).logprobs_R) < TOLERANCES[torch.float32]


def test_bits_of_a_row_are_its_own() -> None:
    logits = logits_RV(torch.bfloat16)
    together, alone = scanned(logits), scanned(logits[1:2])
    for one, all_rows in zip(alone[:3], together[:3], strict=True):
        assert torch.equal(one[0], all_rows[1])
