"""Products of rows with the matrices of a part. Shape legend: kernels/interface.py."""

from collections.abc import Sequence

import torch

from windlass.kernels.triton.dense import DenseProducts
from windlass.kernels.triton.linear import Linear, run_linear
from windlass.kernels.triton.tiles import linear_tile
from windlass.tensors import Packed, PackedStack, Tensors, Weight, plain_or_none


class Products:
    """By the BLAS where it keeps a row's bits, else by kernels of our own. `is_narrow`: in 16 bits
    (kernels/cuda.py)."""

    def __init__(self, *, is_narrow: bool) -> None:
        self._is_narrow = is_narrow
        self._dense = DenseProducts()

    def linear(
        self,
        x_TD: torch.Tensor,
        w: Weight,
        bias_E: torch.Tensor | None,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        """See `Kernels.linear`; of `rows` for `w`."""
        y_TE = self._dense.linear(x_TD, w)
        if y_TE is not None:
            y_TE = y_TE if bias_E is None else y_TE.add_(bias_E)
            return y_TE if out is None else out.copy_(y_TE)
        matrices = Linear.of(w, x_TD.dtype)
        features, _ = matrices.shape
        if out is None:
            out = torch.empty(
                len(x_TD), matrices.num * features, dtype=torch.float32, device=x_TD.device
            )
        if len(x_TD):
            tile = linear_tile(matrices.matrix, x_TD.dtype, rows=len(x_TD))
            bias_E = None if bias_E is None else bias_E.contiguous()
            parts = out.view(len(out), matrices.num, features)
            run_linear(x_TD, matrices, bias_E, tile, out=parts)
        return out

    def linears(self, x_TD: torch.Tensor, w: Tensors, names: Sequence[str]) -> list[torch.Tensor]:
        """See `Kernels.linears`."""
        rows: dict[torch.dtype, torch.Tensor] = {}  # of the types that are multiplied in
        found = []
        for name in names:
            one = w[f"{name}.weight"]
            compute = self._compute(one)
            if compute not in rows:
                rows[compute] = self.rows(x_TD, one)
            found.append(self.linear(rows[compute], one, plain_or_none(w, f"{name}.bias"), None))
        return found

    def batched_linear(
        self, x_THa: torch.Tensor, w_Hba: torch.Tensor | PackedStack
    ) -> torch.Tensor:
        """See `Kernels.batched_linear`. Recurrent states, which are fp32, are multiplied in fp32
        always."""
        is_state = isinstance(w_Hba, torch.Tensor) and w_Hba.dtype is torch.float32
        x_THa = x_THa.contiguous() if is_state else self.rows(x_THa, w_Hba)
        heads, features, _ = w_Hba.shape
        out = torch.empty(len(x_THa), heads, features, dtype=torch.float32, device=x_THa.device)
        # a packed stack's scales and codes lie different distances apart: a launch for each head
        stack: tuple[torch.Tensor | Packed, ...] = (
            w_Hba.matrices if isinstance(w_Hba, PackedStack) else (w_Hba,)
        )
        step = heads // len(stack)
        for i, w in enumerate(stack if len(x_THa) else ()):
            part = slice(i * step, (i + 1) * step)
            matrices = Linear.of(w, x_THa.dtype)
            tile = linear_tile(matrices.matrix, x_THa.dtype, rows=len(x_THa))
            run_linear(x_THa[:, part], matrices, None, tile, out=out[:, part])
        return out

    def _compute(self, w: Weight) -> torch.dtype:
        """The type that rows are multiplied with `w` in."""
        if not self._is_narrow:
            return torch.float32
        return w.dtype if isinstance(w, torch.Tensor) else torch.bfloat16

    def rows(self, x: torch.Tensor, w: Weight) -> torch.Tensor:
        """Contiguous, in the type that they are multiplied with `w` in."""
        compute = self._compute(w)
        if self._is_narrow and compute is torch.float32:
            x = x.bfloat16()
        return x.to(compute).contiguous()
