"""Products of the native library: dense matrices, one matrix for each head, expert networks. Shape
legend: kernels/interface.py."""

import ctypes as c
from collections.abc import Mapping, Sequence

import torch

from windlass.kernels.cpu import library as lib
from windlass.kernels.cpu.matrices import elements_together, heads_of
from windlass.kernels.cpu.prepared import Linears, NativeExperts, network_of, prepared
from windlass.kernels.cpu.session import Session
from windlass.kernels.interface import ExpertGroups
from windlass.models.spec import Activation, ClampedSwiGlu, GeGlu, ReluSquared, SwiGlu
from windlass.tensors import PackedStack, Tensors, Weight, plain_or_none

_EXACT = 0  # precision of fp32 activations
_PLAIN_ACTIVATIONS = {SwiGlu: 0, GeGlu: 2, ReluSquared: 3}  # without settings


def linear(
    session: Session,
    x_TD: torch.Tensor,
    w: Weight,
    bias_E: torch.Tensor | None,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """See `Kernels.linear`."""
    one = Linears([(w, bias_E)])
    if out is None:
        return _products(session, x_TD, one)[0]
    assert out.stride(1) == 1, "elements of a row lie side by side"
    _multiply(session, x_TD, one, [out])
    return out


def linears(
    session: Session, x_TD: torch.Tensor, w: Tensors, names: Sequence[str]
) -> list[torch.Tensor]:
    """See `Kernels.linears`."""

    def make() -> Linears:
        return Linears([(w[f"{name}.weight"], plain_or_none(w, f"{name}.bias")) for name in names])

    return _products(session, x_TD, prepared(w, names, make))


def batched_linear(
    session: Session, x_THa: torch.Tensor, w_Hba: torch.Tensor | PackedStack
) -> torch.Tensor:
    """See `Kernels.batched_linear`."""
    num_rows, heads, _ = x_THa.shape
    if x_THa.stride(2) != 1:
        x_THa = x_THa.contiguous()
    matrices = heads_of(w_Hba)
    out_THb = session.empty(num_rows, heads, matrices[0].n)
    products = (lib.Product * heads)()
    for head, (product, m) in enumerate(zip(products, matrices, strict=True)):
        product.x = x_THa.data_ptr() + 4 * head * x_THa.stride(1)
        product.ldx = x_THa.stride(0)
        product.w = c.pointer(m)
        product.out = out_THb.data_ptr() + 4 * head * m.n
        product.ldo = heads * m.n
    # always exact: the matrices may be recurrent states
    session.call("wl_products", products, heads, num_rows, _EXACT, keep=matrices)
    return out_THb


def expert_ffn(
    session: Session, x_ND: torch.Tensor, w: Tensors, activation: Activation
) -> torch.Tensor:
    """See `Kernels.expert_ffn`."""
    x_ND = elements_together(x_ND)
    network = network_of(w)
    out_ND = session.empty(x_ND.shape[0], network.width)
    one = (lib.Expert * 1)(network.struct)
    one[0].num_rows = x_ND.shape[0]
    session.call(
        "wl_experts",
        x_ND.data_ptr(), x_ND.stride(0), out_ND.data_ptr(), out_ND.stride(0), one, 1,
        *_activation(activation), session.precision, keep=network,
    )  # fmt: skip
    return out_ND


def experts(
    session: Session,
    x_TD: torch.Tensor,
    weights: Mapping[int, Tensors],
    groups: ExpertGroups,
    activation: Activation,
    out: torch.Tensor,
) -> None:
    """See `Kernels.experts`."""
    x_TD = elements_together(x_TD)
    num_experts = groups.counts_E.shape[0]
    if not isinstance(weights, NativeExperts):
        held = NativeExperts(num_experts)
        held.hold(weights)
        weights = held
    session.call(
        "wl_routed",
        x_TD.data_ptr(), x_TD.stride(0), out.data_ptr(), out.stride(0), weights.table, num_experts,
        groups.counts_E.data_ptr(), groups.rows.data_ptr(), groups.order.data_ptr(),
        *_activation(activation), session.precision, keep=weights,
    )  # fmt: skip


def _products(session: Session, x_TD: torch.Tensor, which: Linears) -> list[torch.Tensor]:
    outs = [session.empty(x_TD.shape[0], width) for width in which.widths]
    _multiply(session, x_TD, which, outs)
    return outs


def _multiply(
    session: Session, x_TD: torch.Tensor, which: Linears, outs: Sequence[torch.Tensor]
) -> None:
    x_TD = elements_together(x_TD)
    products = (lib.Product * len(which.products)).from_buffer_copy(which.products)
    x, ldx = x_TD.data_ptr(), x_TD.stride(0)
    places = [(out.data_ptr(), out.stride(0)) for out in outs]
    for product, (index, column) in zip(products, which.places, strict=True):
        start, ldo = places[index]
        product.x, product.ldx = x, ldx
        product.out, product.ldo = start + 4 * column, ldo
    num_rows, precision = x_TD.shape[0], session.precision
    session.call("wl_products", products, len(products), num_rows, precision, keep=which)


def _activation(activation: Activation) -> tuple[int, float, float]:
    if isinstance(activation, ClampedSwiGlu):
        return 1, activation.alpha, activation.limit
    return _PLAIN_ACTIVATIONS[type(activation)], 0.0, 0.0
