"""Every family through the whole engine, computed by the kernels of a CUDA device, in the
interpreter: what they give, and that a row's bits are its own."""

from pathlib import Path

import pytest
import torch

from engines import FAMILIES, engine_for, logprob_rows, make_model, prompts, request, run_all
from windlass.kernels.cuda import CudaKernels
from windlass.kernels.interface import Kernels
from windlass.kernels.reference import TorchKernels

STEPS = 2
LENGTHS = (9, 4)


def _logprobs(path: Path, kernels: Kernels, lengths=LENGTHS, **options) -> list[torch.Tensor]:
    texts = prompts(LENGTHS)
    requests = [
        request(str(i), texts[i][:length], max_tokens=STEPS, logprobs=-1)
        for i, length in enumerate(lengths)
    ]
    with engine_for(path, kernels=kernels, **options) as engine:
        results = run_all(engine, requests)
    return [logprob_rows(results[str(i)]) for i in range(len(requests))]


@pytest.mark.parametrize("family", FAMILIES)
def test_as_with_torch(family: str, tmp_path: Path) -> None:
    make_model(family, tmp_path, dtype=torch.bfloat16)
    want, got = (_logprobs(tmp_path, kernels) for kernels in (TorchKernels(), CudaKernels(80)))
    for one, other in zip(want, got, strict=True):
        assert (one - other).abs().max() < 1e-4
