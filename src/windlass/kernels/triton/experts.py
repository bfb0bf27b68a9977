"""Experts of a layer over slots of an arena: kernels.

Places (row * A + choice) are sorted by expert, as `ExpertGroups` has them. Weights are never
gathered: a tile of rows of one expert looks up the expert's slot and reads there; -1 means that
another launch has it, so one set of tables serves a launch for each group of experts that arrives.
Two launches (gate, up and activation; down, each row to its own place) and `combine` in routing
order, without atomics: nothing depends on who came first.

A row's sums are taken in one order of k, whatever the number of rows and of rows in a tile. The
kernels for few rows use no dot: other sums, so a mode of its own, chosen by the plan.
"""

import triton
import triton.language as tl

from windlass.kernels.triton import unpack


@triton.jit(do_not_specialize=["M"])  # another for each pass
def plan_tiles(counts_E, tiles_3M, E, M, BM: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr):
    """Tiles of at most BM places of one expert: expert, first place, number of places; beyond the
    last, expert -1. Nothing is read back: M is the most there can be."""
    e = tl.arange(0, BE)
    counts = tl.load(counts_E + e, mask=e < E, other=0).to(tl.int32)
    tiles = (counts + BM - 1) // BM
    ends = tl.cumsum(tiles, 0)
    starts = ends - tiles
    firsts = tl.cumsum(counts, 0) - counts
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    is_mine = (starts[None, :] <= t[:, None]) & (t[:, None] < ends[None, :])
    nth = t - tl.sum(tl.where(is_mine, starts[None, :], 0), 1)
    first = tl.sum(tl.where(is_mine, firsts[None, :], 0), 1) + nth * BM
    rows = tl.minimum(tl.sum(tl.where(is_mine, counts[None, :], 0), 1) - nth * BM, BM)
    expert = tl.sum(tl.where(is_mine, e[None, :] + 1, 0), 1) - 1
    tl.store(tiles_3M + t, expert, mask=t < M)
    tl.store(tiles_3M + M + t, first, mask=t < M)
    tl.store(tiles_3M + 2 * M + t, rows, mask=t < M)


@triton.jit
def activate(gate, up, alpha, limit, ACTIVATION: tl.constexpr):
    """models/spec.py's activations, in fp32."""
    if ACTIVATION == "silu":
        y = gate * tl.sigmoid(gate) * up
    elif ACTIVATION == "clamped":
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        y = (up + 1.0) * gate * tl.sigmoid(alpha * gate)
    elif ACTIVATION == "gelu":  # in its tanh form: (1 + tanh z) / 2 = sigmoid(2 z)
        z = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        y = gate * tl.sigmoid(2.0 * z) * up
    else:
        tl.static_assert(ACTIVATION == "relu2")
        y = tl.maximum(up, 0.0)
        y *= y
    return y


@triton.jit(do_not_specialize=["size"])  # another for each pass
def activate_rows(gate, up, out, size, alpha, limit, ACTIVATION: tl.constexpr, BN: tl.constexpr):
    """out = activation of as many numbers, all fp32."""
    i = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    u = tl.load(up + i, mask=i < size, other=0.0)
    g = u
    if ACTIVATION != "relu2":
        g = tl.load(gate + i, mask=i < size, other=0.0)
    tl.store(out + i, activate(g, u, alpha, limit, ACTIVATION), mask=i < size)


@triton.jit
def _inputs(x, row, is_alive, k0, K, BK: tl.constexpr, EVEN: tl.constexpr):
    """Rows of x (.., K) at columns from k0: (BM, BK), zeros beyond."""
    k = k0 + tl.arange(0, BK)
    ok = is_alive[:, None]
    if not EVEN:
        ok = ok & (k < K)[None, :]
    return tl.load(x + row[:, None] * K + k[None, :], mask=ok, other=0.0)


@triton.jit(do_not_specialize=["M"])  # another for each pass
def gate_up(
    x, rows_P, tiles_3M, M, slots_E, arena, slot_bytes, gate, up, gate_bias, up_bias, hidden, I, D,
    alpha, limit, ACTIVATION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """hidden[p] (I,) = activation of the p-th place in the order of experts. x (T, D), hidden
    (P, I) of the type that is multiplied in."""
    t = tl.program_id(1)
    expert = tl.load(tiles_3M + t)
    if expert < 0:
        return
    slot = tl.load(slots_E + expert)
    if slot < 0:
        return
    base = arena + slot.to(tl.int64) * slot_bytes
    i = tl.arange(0, BM)
    is_alive = i < tl.load(tiles_3M + 2 * M + t)
    place = (tl.load(tiles_3M + M + t) + i).to(tl.int64)
    row = tl.load(rows_P + place, mask=is_alive, other=0).to(tl.int64)
    n0 = tl.program_id(0) * BN
    TYPE: tl.constexpr = x.dtype.element_ty
    g = tl.zeros((BM, BN), tl.float32)
    u = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, D, BK):
        a = _inputs(x, row, is_alive, k0, D, BK, EVEN)
        if ACTIVATION != "relu2":
            g = unpack.add_dot(g, a, base, gate, n0, k0, I, D, TYPE, BN, BK, EVEN)
        u = unpack.add_dot(u, a, base, up, n0, k0, I, D, TYPE, BN, BK, EVEN)
    if ACTIVATION != "relu2":
        g = g * unpack.row_scales(base, gate, n0, I, BN)[None, :]
        g += unpack.bias(base, gate_bias, n0, I, BN)[None, :]
    u = u * unpack.row_scales(base, up, n0, I, BN)[None, :]
    u += unpack.bias(base, up_bias, n0, I, BN)[None, :]
    y = activate(g, u, alpha, limit, ACTIVATION).to(TYPE)
    n = n0 + tl.arange(0, BN)
    ok = is_alive[:, None] & (n < I)[None, :]
    tl.store(hidden + place[:, None] * I + n[None, :], y, mask=ok)


@triton.jit(do_not_specialize=["M"])  # another for each pass
def down(
    hidden, order_P, tiles_3M, M, slots_E, arena, slot_bytes, w, w_bias, out, D, I,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """out[place] (D,), fp32 = down of the p-th row of hidden, at the place it belongs to."""
    t = tl.program_id(1)
    expert = tl.load(tiles_3M + t)
    if expert < 0:
        return
    slot = tl.load(slots_E + expert)
    if slot < 0:
        return
    base = arena + slot.to(tl.int64) * slot_bytes
    i = tl.arange(0, BM)
    is_alive = i < tl.load(tiles_3M + 2 * M + t)
    p = (tl.load(tiles_3M + M + t) + i).to(tl.int64)
    n0 = tl.program_id(0) * BN
    TYPE: tl.constexpr = hidden.dtype.element_ty
    y = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, I, BK):
        a = _inputs(hidden, p, is_alive, k0, I, BK, EVEN)
        y = unpack.add_dot(y, a, base, w, n0, k0, D, I, TYPE, BN, BK, EVEN)
    y = y * unpack.row_scales(base, w, n0, D, BN)[None, :]
    y += unpack.bias(base, w_bias, n0, D, BN)[None, :]
    place = tl.load(order_P + p, mask=is_alive, other=0).to(tl.int64)
    n = n0 + tl.arange(0, BN)
    ok = is_alive[:, None] & (n < D)[None, :]
    tl.store(out + place[:, None] * D + n[None, :], y, mask=ok)


@triton.jit
def _input(x, k0, K, BK: tl.constexpr, EVEN: tl.constexpr):
    """A row x (K,) at columns from k0: (BK,) in fp32, zeros beyond."""
    k = k0 + tl.arange(0, BK)
    if EVEN:
        found = tl.load(x + k)
    else:
        found = tl.load(x + k, mask=k < K, other=0.0)
    return found.to(tl.float32)


@triton.jit
def gate_up_few(
    x, ids_P, slots_E, arena, slot_bytes, gate, up, gate_bias, up_bias, hidden, I, D, alpha, limit,
    A, ACTIVATION: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """As `gate_up`, of one place per program, in the order of places: nothing is sorted."""
    p = tl.program_id(1)
    slot = tl.load(slots_E + tl.load(ids_P + p))
    if slot < 0:
        return
    base = arena + slot.to(tl.int64) * slot_bytes
    n0 = tl.program_id(0) * BN
    row = x + (p // A).to(tl.int64) * D
    g = tl.zeros((BN,), tl.float32)
    u = tl.zeros((BN,), tl.float32)
    for k0 in range(0, D, BK):
        a = _input(row, k0, D, BK, EVEN)
        if ACTIVATION != "relu2":
            g = unpack.add_product(g, a, base, gate, n0, k0, I, D, BN, BK, EVEN)
        u = unpack.add_product(u, a, base, up, n0, k0, I, D, BN, BK, EVEN)
    if ACTIVATION != "relu2":
        g = g * unpack.row_scales(base, gate, n0, I, BN) + unpack.bias(base, gate_bias, n0, I, BN)
    u = u * unpack.row_scales(base, up, n0, I, BN) + unpack.bias(base, up_bias, n0, I, BN)
    y = activate(g, u, alpha, limit, ACTIVATION).to(hidden.dtype.element_ty)
    n = n0 + tl.arange(0, BN)
    tl.store(hidden + p.to(tl.int64) * I + n, y, mask=n < I)


@triton.jit
def down_few(
    hidden, ids_P, slots_E, arena, slot_bytes, w, w_bias, out, D, I,
    BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """As `down`, of one place per program, in the order of places."""
    p = tl.program_id(1)
    slot = tl.load(slots_E + tl.load(ids_P + p))
    if slot < 0:
        return
    base = arena + slot.to(tl.int64) * slot_bytes
    n0 = tl.program_id(0) * BN
    row = hidden + p.to(tl.int64) * I
    y = tl.zeros((BN,), tl.float32)
    for k0 in range(0, I, BK):
        a = _input(row, k0, I, BK, EVEN)
        y = unpack.add_product(y, a, base, w, n0, k0, D, I, BN, BK, EVEN)
    y = y * unpack.row_scales(base, w, n0, D, BN) + unpack.bias(base, w_bias, n0, D, BN)
    n = n0 + tl.arange(0, BN)
    tl.store(out + p.to(tl.int64) * D + n, y, mask=n < D)


@triton.jit
def combine(
    out, weights_TA, shared_TD, hidden_TD, D, multiplier, A: tl.constexpr,
    HAS_SHARED: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """hidden += multiplier * (the weighted sum of a row's A outputs, in routing order, + shared),
    all fp32."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    ok = d < D
    total = tl.zeros((BD,), tl.float32)
    for a in tl.static_range(A):
        y = tl.load(out + (t * A + a) * D + d, mask=ok, other=0.0)
        total += tl.load(weights_TA + t * A + a) * y
    if HAS_SHARED:
        total += tl.load(shared_TD + t * D + d, mask=ok, other=0.0)
    at = hidden_TD + t * D + d
    tl.store(at, tl.load(at, mask=ok, other=0.0) + multiplier * total, mask=ok)
