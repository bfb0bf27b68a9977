"""What a packed matrix means: its elements in fp32. Pure functions, the definition that other
kernels are tested against. An element is (code - zero) * scale, rounded once per operation, and
depends on nothing but its own code, zero point and scale.

Shapes: n rows, K columns.
"""

import torch

from windlass.formats import WeightFormat
from windlass.tensors import Packed

_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_E2M1 = torch.cat((_E2M1, -_E2M1))
# which nibble of a word holds the code of column i of eight, where nibbles hold columns
# 0 2 4 6 1 3 5 7
_AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)


def dequantise(w: Packed, first: int, last: int) -> torch.Tensor:
    """Rows `first` to `last` of a matrix -> (n, K) fp32."""
    if w.is_transposed:
        return dequantise(w.t(), 0, w.shape[1])[:, first:last].t()
    codes_nK = _codes(w, first, last)
    zero = _zeros(w, first, last)
    if zero is None:
        codes_nK -= {"int4": 8.0, "int8": 128.0}.get(w.format.code, 0.0)
    else:
        codes_nK -= _over_columns(w, zero)
    return codes_nK.mul_(_over_columns(w, _scales(w, first, last)))


def _codes(w: Packed, first: int, last: int) -> torch.Tensor:
    """Codes as numbers (n, K); those of integers before the zero point is taken off."""
    form, width = w.format, w.shape[1]
    if form.packing == "gptq":
        return _unpack_down(w.codes[:, first:last], _bits(form)).t().float()
    if form.packing == "awq":
        return _awq(w.codes, first, last).t().float()
    codes = w.codes[first:last]
    if form.code == "e4m3":
        return codes.view(torch.float8_e4m3fn).float()
    if form.code == "int8":
        return codes[:, :width].float()
    nibbles = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)[:, :width]
    if form.code == "e2m1":
        return _E2M1.to(codes.device).index_select(0, nibbles.flatten().int()).view(nibbles.shape)
    return nibbles.float()


def _scales(w: Packed, first: int, last: int) -> torch.Tensor:
    """(n, blocks of k), or (1, blocks of k) for one scale of all rows."""
    scales = w.scales[_block_rows(w.format.rows, first, last)]
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    scales = scales.float()
    if w.format.rows <= 1:
        return scales
    rows = torch.arange(first, last, device=scales.device) // w.format.rows
    rows -= first // w.format.rows
    return scales[rows]


def _block_rows(rows: int, first: int, last: int) -> slice:
    """Rows of a tensor with an entry for each `rows` rows that rows `first` to `last` need."""
    return slice(first // rows, (last - 1) // rows + 1) if rows else slice(None)


def _zeros(w: Packed, first: int, last: int) -> torch.Tensor | None:
    """Zero points (n, groups) as numbers, or None for the format's own."""
    if w.zeros is None:
        return None
    if w.format.zero == "awq":
        return _awq(w.zeros, first, last).t().float()
    bits = _bits(w.format)
    per_word = 32 // bits
    words, start = _block_rows(per_word, first, last), first % per_word
    across = w.zeros[words] if w.format.zero == "rows" else w.zeros[:, words].t()
    found = _unpack_down(across, bits)[start : start + last - first]
    # AutoGPTQ stores a zero of 0, less one, as the largest code
    return found.add(w.format.zero_add).bitwise_and(2**bits - 1).float()


def _over_columns(w: Packed, per_group: torch.Tensor) -> torch.Tensor:
    """(n, groups) -> (n, K), or (n, 1) where all columns share one."""
    if w.groups is not None:
        return per_group.index_select(1, w.groups)
    if not w.format.columns:
        return per_group
    wide = per_group.repeat_interleave(w.format.columns, dim=1)
    return wide[:, : w.shape[1]]


def _unpack_down(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 words (a, b), each of 32 / bits numbers along the first dimension, lowest bits first ->
    (a * 32 / bits, b)."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)[:, None]
    numbers: torch.Tensor = (words[:, None] >> shifts) & (2**bits - 1)
    return numbers.flatten(0, 1)


def _awq(words: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """int32 words (a, N / 8) in AWQ's order -> columns `first` to `last` (a, n)."""
    shifts = 4 * torch.tensor(_AWQ_NIBBLES, dtype=torch.int32, device=words.device)
    part = words[:, _block_rows(8, first, last)]
    numbers: torch.Tensor = (part[:, :, None] >> shifts) & 15
    return numbers.flatten(1)[:, first % 8 : first % 8 + last - first]


def _bits(form: WeightFormat) -> int:
    return 4 if form.code in ("int4", "e2m1") else 8
