"""Tiles of a stored matrix as numbers, inside kernels: what kernels/dequantise.py defines.

A tile is (BN, BK): BN rows from n0, BK columns from k0. Beyond the matrix it holds finite numbers
that callers multiply by zero or do not store. A matrix has fewer than 2^31 elements.
"""

import triton
import triton.language as tl


@triton.jit
def typed(address, TYPE: tl.constexpr):
    """A pointer to bytes as one to TYPE."""
    return address.to(tl.pointer_type(TYPE), bitcast=True)


@triton.jit
def spread(blocks, BN: tl.constexpr, NG: tl.constexpr, BK: tl.constexpr):
    """(BN, NG) -> (BN, BK): each for its BK / NG columns."""
    if NG == 1:
        wide = tl.broadcast_to(blocks, (BN, BK))
    else:
        apart = tl.broadcast_to(blocks[:, :, None], (BN, NG, BK // NG))
        wide = tl.reshape(apart, (BN, BK))
    return wide


@triton.jit
def _apart(words, A: tl.constexpr, B: tl.constexpr, BITS: tl.constexpr, PER: tl.constexpr,
           IS_AWQ: tl.constexpr):  # fmt: skip
    """(A, B) words of PER numbers -> (A, B * PER), the lowest bits first or in AWQ's order."""
    i = tl.arange(0, PER)
    if IS_AWQ:
        i = (i % 2) * 4 + i // 2
    numbers = (words[:, :, None] >> (i * BITS)[None, None, :]) & (2**BITS - 1)
    return tl.reshape(numbers, (A, B * PER))


@triton.jit
def _stored(base, w, n0, k0, N, K, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr):
    """(BN, BK) codes as they are stored, of the type they are loaded in."""
    codes = typed(base + w.at, w.element)
    BITS: tl.constexpr = 4 if w.code == "int4" or w.code == "e2m1" else 8
    IS_AWQ: tl.constexpr = w.packing == "awq"
    PER: tl.constexpr = (
        1 if w.code == "plain" or IS_AWQ else (32 if w.packing == "gptq" else 8) // BITS
    )
    if IS_AWQ:
        n = n0 // 8 + tl.arange(0, BN // 8)
        ok = (n < N // 8)[:, None]
    else:
        n = n0 + tl.arange(0, BN)
        ok = (n < N)[:, None]
    k = k0 // PER + tl.arange(0, BK // PER)
    if not EVEN:
        ok = ok & (k < (K + PER - 1) // PER)[None, :]
    found = tl.load(codes + n[:, None] * w.sn + k[None, :] * w.sk, mask=ok, other=0)
    if IS_AWQ:
        numbers = tl.trans(_apart(tl.trans(found), BK, BN // 8, 4, 8, True))
    elif PER > 1:
        numbers = _apart(found, BN, BK // PER, BITS, PER, False)
    else:
        numbers = found
    return numbers


@triton.jit
def _groups(base, w, k0, K, BK: tl.constexpr):
    """The group of each of a tile's columns (BK,)."""
    k = k0 + tl.arange(0, BK)
    if w.has_groups:
        groups = tl.load(typed(base + w.groups_at, tl.int32) + k, mask=k < K, other=0)
    else:
        groups = tl.minimum(k, K - 1) // w.columns
    return groups


@triton.jit
def _blocks(w, k0, K, NG: tl.constexpr):
    """The blocks of columns in a tile (NG,)."""
    if w.columns == 0:
        blocks = tl.arange(0, NG)
    else:
        blocks = tl.minimum(tl.arange(0, NG) + k0 // w.columns, (K - 1) // w.columns)
    return blocks


@triton.jit
def _zeros_at(base, w, n0, g, N, BN: tl.constexpr):
    """Zero points (BN, groups of g), as integers."""
    BITS: tl.constexpr = 4 if w.code == "int4" else 8
    PER: tl.constexpr = 32 // BITS
    n = n0 + tl.arange(0, BN)
    words = tl.load(
        typed(base + w.zeros_at, tl.int32) + (n // PER)[:, None] * w.zeros_sn
        + g[None, :] * w.zeros_sk, mask=(n < N)[:, None], other=0)  # fmt: skip
    i = n % PER
    if w.zero == "awq":
        i = (i % 2) * 4 + i // 2
    # AutoGPTQ stores a zero of 0, less one, as the largest code
    return ((words >> (i * BITS)[:, None]) + w.zero_add) & (2**BITS - 1)


@triton.jit
def _scales_at(base, w, n0, g, N, BN: tl.constexpr):
    """Scales (BN, groups of g) in fp32."""
    n = n0 + tl.arange(0, BN)
    ok = (n < N)[:, None]
    if w.rows > 0:
        block = n // w.rows
    else:
        block = n * 0
    at = block[:, None] * w.scales_sn + g[None, :] * w.scales_sk
    found = tl.load(typed(base + w.scales_at, w.scale_type) + at, mask=ok, other=0)
    if w.is_power:  # E8M0: 2^(byte - 127), of which the least is no normal number, the last none
        byte = found.to(tl.int32)
        bits = tl.where(byte == 0, 0x00400000, tl.where(byte == 255, 0x7FC00000, byte << 23))
        scales = bits.to(tl.float32, bitcast=True)
    else:
        scales = found.to(tl.float32)
    return scales


@triton.jit
def numbers(base, w, n0, k0, N, K, TYPE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
            NG: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """(BN, BK) of TYPE: plain weights, or codes with their zero points taken off and not scaled:
    integers of less than 256, and floats of 4 bits and less, are exact in every type."""
    stored = _stored(base, w, n0, k0, N, K, BN, BK, EVEN)
    if w.code == "plain":
        tile = stored
    elif w.code == "e4m3":  # as fp16 with its exponent 8 less
        half = ((stored & 0x80).to(tl.uint16) << 8) | ((stored & 0x7F).to(tl.uint16) << 7)
        wide = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        tile = tl.where((stored & 0x7F) == 0x7F, float("nan"), wide)
    elif w.code == "e2m1":  # as fp16 with its exponent 14 less
        half = ((stored & 8).to(tl.uint16) << 12) | ((stored & 7).to(tl.uint16) << 9)
        tile = half.to(tl.float16, bitcast=True).to(tl.float32) * 16384.0
    elif w.zero == "none":
        tile = stored.to(tl.int32) - (8 if w.code == "int4" else 128)
    elif w.scaling == "gathered":
        zeros = _zeros_at(base, w, n0, _groups(base, w, k0, K, BK), N, BN)
        tile = stored.to(tl.int32) - zeros
    else:
        zeros = _zeros_at(base, w, n0, _blocks(w, k0, K, NG), N, BN)
        tile = stored.to(tl.int32) - spread(zeros, BN, NG, BK)
    return tile.to(TYPE)


@triton.jit
def block_scales(base, w, n0, k0, N, K, BN: tl.constexpr, NG: tl.constexpr):
    """(BN, NG) in fp32: of the blocks of columns in a tile."""
    return _scales_at(base, w, n0, _blocks(w, k0, K, NG), N, BN)


@triton.jit
def number_scales(base, w, n0, k0, N, K, BN: tl.constexpr, BK: tl.constexpr, NG: tl.constexpr):
    """(BN, BK) in fp32: of each number of a tile."""
    if w.scaling == "gathered":
        scales = _scales_at(base, w, n0, _groups(base, w, k0, K, BK), N, BN)
    else:
        scales = spread(block_scales(base, w, n0, k0, N, K, BN, NG), BN, NG, BK)
    return scales


@triton.jit
def _transposed(base, w, n0, k0, N, K, BN: tl.constexpr, BK: tl.constexpr):
    """(BK, BN) in fp32: the tile's numbers, scaled, as the stored matrix (K, N) has them."""
    NG: tl.constexpr = 1 if w.columns == 0 or w.columns >= BN else BN // w.columns
    tile = numbers(base, w, k0, n0, K, N, tl.float32, BK, BN, NG, False)
    return tile * number_scales(base, w, k0, n0, K, N, BK, BN, NG)


@triton.jit
def _add_wide(acc, x, wide, IS_POWER: tl.constexpr, TYPE: tl.constexpr):
    """acc + x . wide (BK, BN), which is fp32: in two numbers of 16 bits where one would round."""
    high = wide.to(TYPE)
    if not IS_POWER and TYPE != tl.float32:  # what 16 bits leave of it, too
        rest = (wide - high.to(tl.float32)).to(TYPE)
        acc = tl.dot(x, rest, acc, input_precision="ieee")
    return tl.dot(x, high, acc, input_precision="ieee")


@triton.jit
def add_dot(acc, x, base, w, n0, k0, N, K, TYPE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
            EVEN: tl.constexpr):  # fmt: skip
    """acc (BM, BN) + x (BM, BK) . tile.T, sums in fp32; the rest is `row_scales`'s."""
    if w.is_transposed:
        return _add_wide(acc, x, _transposed(base, w, n0, k0, N, K, BN, BK), w.is_power, TYPE)
    NG: tl.constexpr = 1 if w.columns == 0 or w.columns >= BK else BK // w.columns
    tile = numbers(base, w, n0, k0, N, K, TYPE, BN, BK, NG, EVEN)
    if w.scaling == "sums":
        tl.static_assert(NG == 1, "a tile of several blocks")
        part = tl.dot(x, tl.trans(tile), input_precision="ieee")
        acc += part * tl.trans(block_scales(base, w, n0, k0, N, K, BN, 1))
    elif w.scaling == "spread" or w.scaling == "gathered":
        wide = tile.to(tl.float32) * number_scales(base, w, n0, k0, N, K, BN, BK, NG)
        acc = _add_wide(acc, x, tl.trans(wide), w.is_power, TYPE)
    else:
        acc = tl.dot(x, tl.trans(tile), acc, input_precision="ieee")
    return acc


@triton.jit
def add_product(acc, x, base, w, n0, k0, N, K, BN: tl.constexpr, BK: tl.constexpr,
                EVEN: tl.constexpr):  # fmt: skip
    """acc (BN,) + tile . x (BK,), all in fp32 and without a dot; the rest is `row_scales`'s."""
    if w.is_transposed:
        return acc + tl.sum(_transposed(base, w, n0, k0, N, K, BN, BK) * x[:, None], 0)
    NG: tl.constexpr = 1 if w.columns == 0 or w.columns >= BK else BK // w.columns
    tile = numbers(base, w, n0, k0, N, K, tl.float32, BN, BK, NG, EVEN)
    if w.scaling == "spread" or w.scaling == "gathered":
        tile *= number_scales(base, w, n0, k0, N, K, BN, BK, NG)
    products = tile * x[None, :]
    if w.scaling == "sums":
        sums = tl.sum(tl.reshape(products, (BN, NG, BK // NG)), 2)
        acc += tl.sum(sums * block_scales(base, w, n0, k0, N, K, BN, NG), 1)
    else:
        acc += tl.sum(products, 1)
    return acc


@triton.jit
def row_scales(base, w, n0, N, BN: tl.constexpr):
    """(BN,) in fp32: what a row's sum is multiplied by; ones where it is scaled already."""
    if w.scaling == "end" and not w.is_transposed:
        scales = tl.reshape(block_scales(base, w, n0, 0, N, 1, BN, 1), (BN,))
    else:
        scales = tl.full((BN,), 1.0, tl.float32)
    return scales


@triton.jit
def bias(base, v, n0, N, BN: tl.constexpr):
    """(BN,) in fp32; zeros where there is none."""
    n = n0 + tl.arange(0, BN)
    if v.is_there:
        at = typed(base + v.at, v.element) + n * v.stride
        found = tl.load(at, mask=n < N, other=0).to(tl.float32)
    else:
        found = tl.zeros((BN,), tl.float32)
    return found
