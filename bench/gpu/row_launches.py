"""What the kernel table compiles beside experts: attention, products and what happens to rows, at
the shapes of real models, by name."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import torch

from gpu.expert_slots import FORMATS, Sizes, make_layer
from gpu.launches import ALL_FORMATS, SOME_FORMATS, TWO_SIZES
from windlass.kernels.interface import AttentionOptions, AttentionWork, RowTiles
from windlass.kernels.triton import small
from windlass.kernels.triton.attention import attention_blocks, attention_tiles, paged_attention
from windlass.kernels.triton.linear import FEW, Linear, run_linear
from windlass.kernels.triton.logits import HeadState, scan
from windlass.kernels.triton.routing import route
from windlass.kernels.triton.tiles import linear_tile
from windlass.models.spec import (
    RmsNorm,
    Rope,
    RoutingGroups,
    SigmoidTopK,
    SoftmaxTopK,
    TopKSoftmax,
)
from windlass.tensors import PagedRows, Weight

Launch = tuple[str, Callable[[], object]]
FP32, INT8 = torch.float32, torch.int8
PAGE_TOKENS = 32
ROWS = 16
HIDDEN, FEATURES = 2048, 4096
VOCABULARY = 151_936


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Attention of a model. `value_dim`: less than `dim` where values are a part of the keys."""

    heads: int
    kv_heads: int
    dim: int
    value_dim: int = 0
    window: int | None = None
    has_sinks: bool = False


MODELS = {
    "Qwen3-30B-A3B": Heads(heads=32, kv_heads=4, dim=128),
    "gpt-oss-20b": Heads(heads=64, kv_heads=8, dim=64, window=128, has_sinks=True),
    "Qwen3-Next": Heads(heads=16, kv_heads=2, dim=256),
    "heads of 512": Heads(heads=16, kv_heads=2, dim=512),
    "heads of 96": Heads(heads=32, kv_heads=8, dim=96),
    "DeepSeek-V2-Lite": Heads(heads=16, kv_heads=1, dim=576, value_dim=512),
    "DeepSeek-V3": Heads(heads=128, kv_heads=1, dim=576, value_dim=512),
}
NARROW = ("Qwen3-30B-A3B", "Qwen3-Next", "DeepSeek-V2-Lite")  # also with products in fp32


def row_launches(capability: int) -> Iterator[Launch]:
    """As `launches.launches`. Below sm_80 there is no dot of 16 bits that is worth it."""
    narrow = torch.bfloat16 if capability >= 80 else torch.float16
    products = narrow if capability >= 80 else FP32
    for kind, is_prompt in (("decode", False), ("prompts", True)):
        for name, heads in MODELS.items():
            launch = partial(_attention, heads, is_prompt)
            if capability >= 80:
                yield f"{kind} {name}, 16 bits", launch(narrow, narrow)
            if name in NARROW or capability < 80:
                yield f"{kind} {name}, fp32 over 16 bits", launch(FP32, narrow)
        launch = partial(_attention, MODELS["Qwen3-30B-A3B"], is_prompt)
        yield f"{kind} Qwen3-30B-A3B, fp32", launch(FP32, FP32)
        yield f"{kind} Qwen3-30B-A3B, int8", launch(products, INT8)
    for name in FORMATS if capability in ALL_FORMATS else SOME_FORMATS:
        is_more = name in TWO_SIZES
        for dtype in dict.fromkeys((products, FP32) if is_more else (products,)):
            for rows in (16, 32) if is_more else (16,):
                kind = "fp32" if dtype is FP32 else "16 bits"
                yield f"linear {name} by {kind}, {rows} rows", _linear(name, dtype, rows)
        yield f"linear {name}, few", _linear(name, FP32, 0)
    yield from _small(narrow)


def _rows(heads: Heads, width: int, dtype: torch.dtype) -> PagedRows:
    shape = (2, heads.kv_heads, PAGE_TOKENS)
    if dtype is INT8:
        return PagedRows(torch.empty(*shape, width, dtype=torch.uint8), torch.empty(shape))
    return PagedRows(torch.empty(*shape, width, dtype=dtype))


def _attention(
    heads: Heads, is_prompt: bool, products: torch.dtype, stored: torch.dtype
) -> Callable[[], object]:
    def launch() -> None:
        keys = _rows(heads, heads.dim, stored)
        values = _rows(heads, heads.dim, stored)
        if heads.value_dim:
            values = PagedRows(keys.rows_PKBd[..., : heads.value_dim], keys.scales_PKB)
        options = AttentionOptions(
            scale=0.1,
            value_dim=heads.value_dim or heads.dim,
            window=heads.window,
            sinks_H=torch.empty(heads.heads) if heads.has_sinks else None,
        )
        work = AttentionWork((0,), (ROWS,), (2048 - ROWS,), ((0,) * 64,), (is_prompt,))
        group, stored_type = heads.heads // heads.kv_heads, keys.rows_PKBd.dtype
        blocks = attention_blocks(group, heads.dim, products, stored_type, is_prompt=is_prompt)
        rows = blocks.rows(group)
        table = partial(torch.tensor, dtype=torch.int32)
        tiles = attention_tiles(work, RowTiles(is_prompt, rows), table)
        q_THd = torch.empty(ROWS, heads.heads, heads.dim, dtype=products)
        out = torch.empty(ROWS, heads.heads, options.value_dim)
        paged_attention(q_THd, keys, values, tiles, blocks, options, out)

    return launch


@cache
def _matrix(name: str) -> Weight:
    return make_layer(FORMATS[name], Sizes(1, HIDDEN, FEATURES, spare=0)).experts[0]["up"]


def _linear(name: str, dtype: torch.dtype, rows: int) -> Callable[[], object]:
    def launch() -> None:
        w = Linear.of(_matrix(name), dtype)
        tile = linear_tile(w.matrix, dtype, rows=rows) if rows else FEW
        run_linear(torch.empty(ROWS, HIDDEN, dtype=dtype), w, None, tile, few=not rows)

    return launch


def _small(narrow: torch.dtype) -> Iterator[Launch]:
    norm = RmsNorm(eps=1e-6)
    hidden, weight = torch.empty(ROWS, HIDDEN), torch.empty(HIDDEN, dtype=narrow)
    yield "norm", lambda: small.normalise(norm, weight, None, hidden, dtype=narrow)
    yield (
        "norm after a sum",
        lambda: small.normalise(norm, weight, None, hidden, dtype=narrow, added=(hidden, 1.0)),
    )
    heads, table = torch.empty(ROWS, 32, 192), torch.empty(ROWS, 2, 32)
    yield "norm of heads", lambda: small.normalise(norm, None, None, heads[:, :, :128].contiguous())
    for is_interleaved in (False, True):
        rope = Rope(dim=64, theta=1e4, interleaved=is_interleaved)
        yield (
            "rotation" + ", interleaved" * is_interleaved,
            partial(small.rotate, heads[..., 128:], table[:, 0], table[:, 1], rope),
        )
    ids_T = torch.zeros(ROWS, dtype=torch.int64)
    keys, model = torch.empty(ROWS, 4, 128), MODELS["Qwen3-30B-A3B"]
    for name, dtype in (("16 bits", narrow), ("int8", INT8)):
        store = _rows(model, 128, dtype)
        yield (
            f"rows of the cache, {name}",
            partial(small.write_rows, store, ids_T, ids_T, keys),
        )
    embedding = torch.empty(4, HIDDEN, dtype=narrow)
    yield "rows of the embedding", lambda: small.embed(embedding, ids_T, 1.0)
    groups = RoutingGroups(num=8, kept=4, score="top2_sum")
    for name, routing, experts, top_k in (
        ("softmax", SoftmaxTopK(renorm_floor=0.0), 128, 8),
        ("top k", TopKSoftmax(), 128, 4),
        ("sigmoid, groups", SigmoidTopK(renorm_eps=1e-20, groups=groups), 256, 8),
    ):
        logits_TE, bias_E = torch.empty(ROWS, experts), torch.empty(experts)
        yield (
            f"routing, {name}",
            partial(route, routing, top_k, logits_TE, bias_E),
        )
    logits_RC = torch.empty(4, VOCABULARY)
    state = HeadState.begin(4, logits_RC.device)
    yield "logits", lambda: scan(state, logits_RC, 0, targets_R=ids_T)
