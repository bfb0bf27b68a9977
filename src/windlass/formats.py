"""How matrices are stored in a quantised checkpoint, as data. Knows no tensor names, no torch.

A matrix (N, K) of such a format means, in fp32,

    weight[n, k] = (code[n, k] - zero[n // rows, k // columns]) * scale[n // rows, k // columns]

with one scale, and in some formats one zero point, for each block of `rows` x `columns` elements.
"""

from dataclasses import dataclass
from typing import Literal

HF_QUANT_FILE = "hf_quant_config.json"  # where NVIDIA's ModelOpt says how weights are stored
# as config.json calls them
METHODS = ("fp8", "mxfp4", "compressed-tensors", "gptq", "awq", "auto-round", "modelopt")

Code = Literal["e4m3", "e2m1", "int8", "int4"]
Packing = Literal["rows", "gptq", "awq"]
Zero = Literal["none", "rows", "gptq", "awq"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """A way to store a matrix.

    `code`: fp8 (e4m3), fp4 (e2m1 of MXFP4) or an integer. With packing "rows", the codes of a row
    lie side by side, two 4-bit codes to a byte, the lower nibble first, integers as offset binary
    (value + 8, value + 128). "gptq": int32 words (K / c, N) with c codes of consecutive k, the
    lowest bits first. "awq": int32 words (K, N / 8) with eight codes of consecutive n in the order
    0 2 4 6 1 3 5 7.

    `zero`: "none" is 8 or 128 for offset binary and 0 elsewhere; "rows" is (N / c, groups), packed
    like the codes of "rows" but along n; "gptq" is (groups, N / c), lowest bits first, and stands
    for itself plus `zero_add`, modulo its range; "awq" is (groups, N / 8) in the order of its
    codes.
    """

    code: Code
    packing: Packing = "rows"
    rows: int = 1  # of a block; 0: all rows
    columns: int = 0  # of a block; 0: all columns
    zero: Zero = "none"
    zero_add: int = 0
    has_groups: bool = False  # a tensor says the group of each k (activation order)

    @property
    def kind(self) -> str:
        """What such matrices are called where their speed is kept (hardware/profile.py)."""
        if self.packing != "rows":
            return self.packing
        return {"e4m3": "fp8", "e2m1": "mxfp4"}.get(self.code, self.code)
