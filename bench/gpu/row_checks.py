"""What kernels.py checks beside experts: attention, products and small kernels, each against fp64,
the bits of a row in other company, and what it takes."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import triton.testing

from gpu.expert_slots import FORMATS, Sizes, make_layer
from gpu.row_launches import MODELS, Heads
from gpu.tolerances import TOLERANCES, error
from windlass.kernels import routing as reference
from windlass.kernels import rowwise
from windlass.kernels.dequantise import dequantise
from windlass.kernels.interface import AttentionOptions, AttentionWork
from windlass.kernels.triton import small
from windlass.kernels.triton.attention import CudaAttention
from windlass.kernels.triton.linear import FEW, Linear, run_linear
from windlass.kernels.triton.logits import HeadState, scan
from windlass.kernels.triton.routing import route
from windlass.kernels.triton.tiles import linear_tile
from windlass.models.spec import RmsNorm, SoftmaxTopK
from windlass.tensors import Packed, PagedRows

FP32 = torch.float32


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSizes:
    """What is checked. `formats`: names of expert_slots.py."""

    device: str = "cuda"
    models: Mapping[str, Heads] = field(default_factory=lambda: MODELS)
    formats: tuple[str, ...] = tuple(FORMATS)
    rows: tuple[int, ...] = (1, 16, 17, 1024)  # of products
    hidden: int = 2048
    features: int = 4096
    sequences: int = 64
    positions: int = 4096  # of the longest
    vocabulary: int = 151_936
    is_timed: bool = True


DRY = RowSizes(
    device="cpu",
    models={"tiny": Heads(heads=2, kv_heads=1, dim=16, window=20, has_sinks=True)},
    formats=("int8 rows",),
    rows=(1, 2),
    hidden=128,
    features=16,
    sequences=2,
    positions=40,
    vocabulary=300,
    is_timed=False,
)


class Check(NamedTuple):
    name: str
    error: float
    allowed: float
    has_own_bits: bool  # a row's bits are those it has alone
    seconds: float | None  # of one call
    bytes: int  # that it must read

    @property
    def passed(self) -> bool:
        return self.error < self.allowed and self.has_own_bits

    @property
    def rate(self) -> dict[str, float]:
        if self.seconds is None:
            return {}
        gb_per_s = round(self.bytes / self.seconds / 1e9, 1)
        return {"us": round(self.seconds * 1e6, 1), "gb_per_s": gb_per_s}


def row_checks(sizes: RowSizes) -> Iterator[Check]:
    """Each as soon as it is done."""
    for name in sizes.models:
        for products in (torch.bfloat16, FP32):
            for is_prompt in (False, True):
                yield _attention(sizes, name, products, is_prompt=is_prompt)
    for name in sizes.formats:
        for dtype in (torch.bfloat16, FP32):
            yield _linear(sizes, name, dtype)
        yield _linear(sizes, name, FP32, few=True)
    yield from _small(sizes)


def _seconds(sizes: RowSizes, call: Callable[[], object]) -> float | None:
    return triton.testing.do_bench(call) / 1000 if sizes.is_timed else None


def _attention(sizes: RowSizes, name: str, products: torch.dtype, *, is_prompt: bool) -> Check:
    """Of one row of each sequence."""
    heads, num, page = sizes.models[name], sizes.sequences, 32
    per_row = -(-sizes.positions // page)
    shape = (num * per_row, heads.kv_heads, page, heads.dim)
    keys, values = torch.randn(2, *shape, device=sizes.device).to(torch.bfloat16)
    value_dim = heads.value_dim or heads.dim
    if heads.value_dim:
        values = keys[..., :value_dim]
    q_THd = torch.randn(num, heads.heads, heads.dim, device=sizes.device).to(products)
    pages = torch.randperm(num * per_row, device=sizes.device).view(num, -1).int()
    lengths = torch.randint(1, sizes.positions + 1, (num,), device=sizes.device).int()
    lengths[0] = sizes.positions
    sinks = torch.randn(heads.heads, device=sizes.device) if heads.has_sinks else None
    scale = heads.dim**-0.5
    options = AttentionOptions(scale=scale, value_dim=value_dim, window=heads.window, sinks_H=sinks)

    attend = CudaAttention(is_narrow=products.itemsize == 2)

    def work_of(rows: range) -> AttentionWork:
        own = tuple(tuple(pages[i].tolist()) for i in rows)
        first = tuple(int(lengths[i]) - 1 for i in rows)
        num = len(rows)
        return AttentionWork(tuple(range(num)), (1,) * num, first, own, (is_prompt,) * num)

    def run(rows: range, work: AttentionWork) -> torch.Tensor:
        q = q_THd[rows.start : rows.stop]
        cache = PagedRows(keys), PagedRows(values)
        return attend(q, cache, work, options, partial(keys.new_tensor, dtype=torch.int32))

    def alone(i: int) -> torch.Tensor:
        return run(range(i, i + 1), work_of(range(i, i + 1)))[0]

    all_rows, work = range(num), work_of(range(num))
    got = run(all_rows, work)
    want = torch.stack(
        [
            _reference(heads, q_THd[i], keys[pages[i]], values[pages[i]], int(lengths[i]), options)
            for i in range(num)
        ]
    )
    seen = lengths.clamp(max=heads.window) if heads.window else lengths
    width = heads.dim + (0 if heads.value_dim else heads.dim)
    return Check(
        f"{'prompts' if is_prompt else 'decode'} {name} by {products}",
        error(got, want),
        TOLERANCES[products],
        all(torch.equal(alone(i), got[i]) for i in (0, num - 1)),
        _seconds(sizes, lambda: run(all_rows, work)),
        int(seen.sum()) * heads.kv_heads * width * keys.itemsize,
    )


def _reference(
    heads: Heads,
    q_Hd: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    length: int,
    options: AttentionOptions,
) -> torch.Tensor:
    """Of one row over its pages, in fp64 -> (H, v)."""
    first = max(0, length - heads.window) if heads.window else 0
    key, value = (x.transpose(0, 1).flatten(1, 2)[:, first:length].double() for x in (keys, values))
    q = q_Hd.double().unflatten(0, (heads.kv_heads, -1))
    scores = (q @ key.transpose(1, 2) * options.scale).flatten(0, 1)
    if options.sinks_H is not None:
        scores = torch.cat((scores, options.sinks_H.double()[:, None]), 1)
    weights = scores.softmax(1)[:, : length - first]
    return (weights.unflatten(0, (heads.kv_heads, -1)) @ value).flatten(0, 1)


def _linear(sizes: RowSizes, name: str, dtype: torch.dtype, *, few: bool = False) -> Check:
    layer = make_layer(FORMATS[name], Sizes(1, sizes.hidden, sizes.features, spare=0))
    stored = layer.experts[0]["up"]
    host = dequantise(stored, 0, sizes.features) if isinstance(stored, Packed) else stored
    assert isinstance(host, torch.Tensor), "a stack"
    w = Linear.of(stored, dtype)
    w = w.on(w.memory.to(sizes.device))
    x_TD = torch.randn(sizes.rows[-1], sizes.hidden, device=sizes.device).to(dtype)

    def run(rows: int) -> torch.Tensor:
        tile = FEW if few else linear_tile(w.matrix, dtype, rows=rows)
        return run_linear(x_TD[:rows], w, None, tile, few=few)[:, 0]

    got = run(len(x_TD))
    want = x_TD.double() @ host.to(sizes.device).double().t()
    kind = "few rows" if few else str(dtype)
    return Check(
        f"linear {name} by {kind}",
        error(got, want),
        TOLERANCES[dtype],
        all(torch.equal(run(rows), got[:rows]) for rows in sizes.rows),
        _seconds(sizes, lambda: run(sizes.rows[0])),
        len(layer.arena),
    )


def _small(sizes: RowSizes) -> Iterator[Check]:
    rows = torch.randn(7, sizes.hidden, device=sizes.device)
    norm, own = RmsNorm(eps=1e-6), slice(3, 4)
    got = small.normalise(norm, None, None, rows)
    yield Check(
        "norm",
        error(got, rowwise.normalise(norm, None, None, rows.double())),
        TOLERANCES[FP32],
        torch.equal(small.normalise(norm, None, None, rows[own])[0], got[3]),
        _seconds(sizes, lambda: small.normalise(norm, None, None, rows)),
        rows.nbytes,
    )
    routing, logits = SoftmaxTopK(renorm_floor=0.0), rows[:, :128].contiguous()
    routes = route(routing, 8, logits, None)
    want = reference.route(lambda f, x: f(x), routing, 8, logits.double(), None)
    yield Check(
        "routing",
        error(routes.weights_TA, want.weights_TA) + float((routes.ids_TA != want.ids_TA).sum()),
        TOLERANCES[FP32],
        torch.equal(route(routing, 8, logits[own], None).weights_TA[0], routes.weights_TA[3]),
        _seconds(sizes, lambda: route(routing, 8, logits, None)),
        logits.nbytes,
    )
    logits = torch.randn(7, sizes.vocabulary, device=sizes.device)
    found, alone = (HeadState.begin(len(x), x.device) for x in (logits, logits[own]))
    scan(found, logits, 0)
    scan(alone, logits[own], 0)
    total = found.tops_R + found.totals_R.log()
    missed = float((found.ids_R != logits.argmax(1)).sum())
    yield Check(
        "logits",
        error(total, logits.double().logsumexp(1)) + missed,
        TOLERANCES[FP32],
        all(torch.equal(one[0], more[3]) for one, more in zip(alone[:3], found[:3], strict=True)),
        _seconds(sizes, lambda: scan(found, logits, 0)),
        logits.nbytes,
    )
