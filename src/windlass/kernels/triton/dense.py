"""Dense products of a device's BLAS, where it gives a row the same bits in any company.

Its library takes other kernels for other numbers of rows. A shape's row counts are compared once,
when it is first multiplied with, which waits for the device (`row_counts.py`); where too few agree
the kernels of linear.py are taken, for all numbers of rows. Shape legend: kernels/interface.py.
"""

import torch

from windlass.kernels.row_counts import RowLadder, Steps
from windlass.tensors import Weight
from windlass.units import MIB

# smaller calls than 256 rows are no faster than kernels of our own
_STEPS = Steps((16, 32, 64, 128, 256, 512, 1024, 2048), (16, 32, 64), 256, 32 * MIB)
_BYTES = 16  # that rows begin at multiples of, or the library takes other kernels


class DenseProducts:
    """Keeps what is known of each shape. Sets, for the process, that sums of 16-bit products are
    not rounded on the way."""

    def __init__(self) -> None:
        matmul = torch.backends.cuda.matmul
        matmul.allow_bf16_reduced_precision_reduction = False
        matmul.allow_fp16_reduced_precision_reduction = False
        self._ladders: dict[torch.dtype, RowLadder] = {}

    def linear(self, x_TD: torch.Tensor, w: Weight) -> torch.Tensor | None:
        """x @ w.T -> (T, E) fp32, or None where the library is not to be asked: `w` is of another
        type than the rows, no plain contiguous matrix, or its bits depend on their number."""
        if not isinstance(w, torch.Tensor) or w.dtype is not x_TD.dtype or not w.is_contiguous():
            return None
        w_ED = w.view(-1, w.shape[-1])
        shape = w_ED.shape[0], w_ED.shape[1]
        if (shape[1] * w.itemsize) % _BYTES or w.data_ptr() % _BYTES or shape[0] % _BYTES:
            return None
        ladder = self._ladders.get(x_TD.dtype)
        if ladder is None:
            like = x_TD.new_empty(0)
            ladder = self._ladders[x_TD.dtype] = RowLadder(_product, steps=_STEPS, like=like)
        if ladder.counts(shape)[-1] < _STEPS.least:
            return None
        blocks = ladder.blocks(len(x_TD), shape)
        parts = [
            _product(_filled(x_TD[first:last], count), w_ED)[: last - first]
            for first, last, count in blocks
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _product(x_TD: torch.Tensor, w_ED: torch.Tensor) -> torch.Tensor:
    if x_TD.dtype is torch.float32:
        return torch.mm(x_TD, w_ED.t())
    if x_TD.is_cuda:
        return torch.mm(x_TD, w_ED.t(), out_dtype=torch.float32)
    return torch.mm(x_TD.float(), w_ED.float().t())  # a CPU has no products of other types


def _filled(x_TD: torch.Tensor, count: int) -> torch.Tensor:
    """With rows of zeros behind, contiguous."""
    if len(x_TD) == count and x_TD.is_contiguous():
        return x_TD
    filled = x_TD.new_zeros(count, x_TD.shape[1])
    filled[: len(x_TD)] = x_TD
    return filled
