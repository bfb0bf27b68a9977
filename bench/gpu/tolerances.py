"""The one table of how far a GPU kernel may be from a reference in fp64, by the type it rounds to
on the way. Never loosened: what fails it is wrong, or rounds more often than is said here.

Errors are the largest difference over the largest result. fp32: sums of up to 10,000 products lose
some 2^-24 sqrt(10,000), exponentials 2 units; 16 bits: an element is half a unit off, 2^-9 or
2^-12 of it, and sums of such errors, in one direction at worst, stay below twice that.
"""

import torch

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference over the largest of what is wanted; infinite where one is NaN."""
    worst = (got.double() - want.double()).abs().max() / want.double().abs().max()
    return float("inf") if worst.isnan() else worst.item()
