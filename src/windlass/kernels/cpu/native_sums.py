"""What the native library adds to hidden states. Shape legend: kernels/interface.py."""

import torch

from windlass.kernels.cpu.session import Session


def accumulate(
    session: Session, hidden_TD: torch.Tensor, y_TD: torch.Tensor, multiplier: float
) -> None:
    """See `Kernels.accumulate`."""
    _combine(session, None, y_TD, (hidden_TD, hidden_TD), multiplier)


def scale(session: Session, hidden_TD: torch.Tensor, multiplier: float) -> None:
    """See `Kernels.scale`."""
    _combine(session, None, hidden_TD, (None, hidden_TD), multiplier)


def weighted_sum(
    session: Session,
    weights_TA: torch.Tensor,
    outputs_TAD: torch.Tensor,
    shared_TD: torch.Tensor | None,
) -> torch.Tensor:
    """See `Kernels.weighted_sum`."""
    y_TD = session.empty(outputs_TAD.shape[0], outputs_TAD.shape[2])
    _combine(session, (weights_TA, outputs_TAD), shared_TD, (None, y_TD), 1.0)
    return y_TD


def combine(
    session: Session,
    weights_TA: torch.Tensor,
    outputs_TAD: torch.Tensor,
    shared_TD: torch.Tensor | None,
    hidden_TD: torch.Tensor,
    multiplier: float,
) -> None:
    """See `Kernels.combine`."""
    _combine(session, (weights_TA, outputs_TAD), shared_TD, (hidden_TD, hidden_TD), multiplier)


def _combine(
    session: Session,
    experts: tuple[torch.Tensor, torch.Tensor] | None,
    added_TD: torch.Tensor | None,
    between: tuple[torch.Tensor | None, torch.Tensor],
    multiplier: float,
) -> None:
    """`experts`: weights and outputs; `between`: what the sum is added to, and where it goes."""
    residual_TD, out_TD = between
    assert out_TD.is_contiguous(), "rows are written as they lie"
    weights, outputs, per_row = None, None, 0
    if experts is not None:
        weights, outputs = experts[0].contiguous(), experts[1]
        assert outputs.is_contiguous(), "outputs of a row's experts follow each other"
        per_row = outputs.shape[1]
    added_TD = None if added_TD is None else added_TD.contiguous()
    num_rows, width = out_TD.shape
    session.call(
        "wl_combine",
        _address(outputs), _address(weights), _address(added_TD), _address(residual_TD),
        out_TD.data_ptr(), num_rows, per_row, width, multiplier,
    )  # fmt: skip


def _address(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
