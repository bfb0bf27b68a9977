"""How fast the kernels of a run are on this machine: experts and dense products by rows and kind of
weights, attention, memory. Every call is one that a pass makes (runtime/host.py)."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from math import prod

import torch

from windlass.device.host_memory import HostAllocator
from windlass.doctor.bench_model import BenchModel, cold_parts, weight_kind
from windlass.doctor.timing import Timing, measure
from windlass.hardware.profile import Curve
from windlass.ids import Part
from windlass.kernels.interface import AttentionOptions, AttentionWork, ExpertGroups, Kernels
from windlass.models.spec import Gqa, Mla
from windlass.plan import PAGE_TOKENS
from windlass.tensors import PagedRows, StoredTensors, Weight
from windlass.units import MIB

ROWS = (1, 4, 16, 64, 256, 1024)
_GROUP = 8  # experts of one call, as a layer has them at hand
_SINGLE_ROWS = 256  # beyond, experts are called alone: a group's rows would not fit a cache
_ROUNDS = 3  # over all rows, so that what disturbs one moment does not decide a measurement
_PATIENCE_S = 60.0  # of all products; beyond, one round must do
_LIMIT_S = 0.1  # of each measurement in a round, but 3 samples are taken
_LARGE_BYTES = 256 * MIB
_SEQUENCES = 32
_CONTEXT = 512  # positions of each in decode
_PROMPT = 512


@dataclass(slots=True)
class Findings:
    """What was measured so far: curves by kind, and the spread of everything by name."""

    experts: dict[str, Curve] = field(default_factory=dict)
    dense: dict[str, Curve] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    begin_s: float = field(default_factory=time.perf_counter)
    is_hurried: bool = False  # whether time was too short for all rounds

    def rounds(self, time_rows: Callable[[int], Timing]) -> dict[int, Timing]:
        """All samples of all rounds, by rows."""
        samples: dict[int, tuple[float, ...]] = dict.fromkeys(ROWS, ())
        for number in range(_ROUNDS):
            if number and time.perf_counter() - self.begin_s > _PATIENCE_S:
                self.is_hurried = True
                break
            for rows in ROWS:
                samples[rows] += time_rows(rows).samples
        return {rows: Timing(each) for rows, each in samples.items()}

    def curve(self, name: str, timings: Mapping[int, Timing], flops: Callable[[int], int]) -> Curve:
        """FLOP/s over rows; remembers the spreads under `name`."""
        for rows, timing in timings.items():
            self.spread[f"{name}, {rows} rows"] = timing.spread
        return Curve(tuple((rows, flops(rows) / t.median_s) for rows, t in timings.items()))


def measure_memory(kernels: Kernels) -> Timing:
    """Seconds to read `_LARGE_BYTES` once by all threads; `memory_rate` makes a rate of it."""
    large = HostAllocator().empty(_LARGE_BYTES // 4).fill_(1.0)
    return measure(lambda: kernels.read(large), samples=9)


def memory_rate(timing: Timing) -> float:
    """bytes/s."""
    return _LARGE_BYTES / timing.median_s


def measure_products(model: BenchModel, kernels: Kernels, findings: Findings) -> None:
    """Expert networks and dense products of the kinds that the model has."""
    experts = cold_parts(model, Part.EXPERT, fewest=_GROUP)
    kind = weight_kind(experts[0]["gate"])
    timings = findings.rounds(partial(_time_experts, model, kernels, experts))
    one = sum(_elements(experts[0][name]) for name in ("gate", "up", "down"))
    findings.experts[kind] = findings.curve(f"experts {kind}", timings, partial(_flops, one))
    del experts
    for part in (Part.BLOCK, Part.FFN, Part.HEAD):  # each has kinds that the others may lack
        if model.layout.keys(part):
            _measure_dense(cold_parts(model, part), kernels, findings)


def _measure_dense(parts: list[StoredTensors], kernels: Kernels, findings: Findings) -> None:
    """Dense products of kinds that are not measured yet."""
    kinds = {weight_kind(w) for part in parts for w in _matrices(part)}
    for kind in sorted(kinds - set(findings.dense)):
        found = [[w for w in _matrices(part) if weight_kind(w) == kind] for part in parts]
        some = [matrices for matrices in found if matrices]
        elements = sum(_elements(w) for matrices in some for w in matrices) // len(some)
        timings = findings.rounds(partial(_time_dense, kernels, some))
        findings.dense[kind] = findings.curve(f"dense {kind}", timings, partial(_flops, elements))


def _flops(elements: int, rows: int) -> int:
    return 2 * elements * rows


def _time_experts(
    model: BenchModel, kernels: Kernels, experts: list[StoredTensors], rows: int
) -> Timing:
    """Of one expert over `rows` rows, in groups as a layer calls them."""
    group = _GROUP if rows <= _SINGLE_ROWS else 1
    turn = cycle(experts)
    x_TD = torch.randn(rows * group, model.spec.hidden_size)
    out = HostAllocator().empty(rows * group, model.spec.hidden_size)
    groups = ExpertGroups.even(group, rows)
    activation = model.moe.expert.activation

    def call() -> None:
        kernels.experts(x_TD, dict(enumerate(islice(turn, group))), groups, activation, out)

    if not experts[-1].prepared:  # what kernels derive from each expert is made once in a run
        for _ in range(-(-len(experts) // group)):
            call()
    timing = measure(call, limit_s=_LIMIT_S)
    return Timing(tuple(seconds / group for seconds in timing.samples))


def _time_dense(kernels: Kernels, blocks: list[list[Weight]], rows: int) -> Timing:
    """Of all projections of one block over `rows` rows."""
    inputs = {k: torch.randn(rows, k) for some in blocks for w in some for k in (w.shape[-1],)}
    turn = cycle(blocks)

    def call() -> None:
        for w in next(turn):
            kernels.linear(inputs[w.shape[-1]], w)

    return measure(call, limit_s=_LIMIT_S)


def _matrices(part: StoredTensors) -> list[Weight]:
    """The large ones that `linear` multiplies: projections, dense networks, the head."""
    names = ("gate", "up", "down", "weight")
    return [w for name, w in part.items() if name in names or name.endswith("_proj.weight")]


def _elements(w: Weight) -> int:
    return prod(w.shape)


# --- attention ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Heads:
    """H query heads over K key/value heads of widths d and v; `is_shared`: values are the first v
    columns of the keys."""

    query: int
    kv: int
    key_dim: int
    value_dim: int
    is_shared: bool

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.kv * (self.key_dim + (0 if self.is_shared else self.value_dim))

    @property
    def flops_per_position(self) -> int:
        """Of one query: scores and sums."""
        return 2 * self.query * (self.key_dim + self.value_dim)


def _heads(model: BenchModel) -> _Heads | None:
    """Of the first block whose cache grows; None where no block's does."""
    for block in model.spec.blocks:
        match block.attention:
            case Gqa(num_heads=heads, num_kv_heads=kv, head_dim=dim):
                return _Heads(heads, kv, dim, dim, False)
            case Mla(num_heads=heads, kv_lora_rank=latent, rope=rope):
                return _Heads(heads, 1, latent + rope.dim, latent, True)
    return None


def measure_attention(
    model: BenchModel, kernels: Kernels, findings: Findings
) -> tuple[float, float]:
    """Bytes/s of keys and values in decode (bf16, contexts of 512), FLOP/s of a prompt."""
    heads = _heads(model) or _Heads(32, 4, 128, 128, False)
    call, num_bytes = decode_attention(model, kernels)
    decode = measure(call, samples=9)
    prefill = measure(_attention_call(kernels, heads, (_PROMPT, _PROMPT), 1), samples=9)
    findings.spread["decode attention"] = decode.spread
    findings.spread["prefill attention"] = prefill.spread
    flops = heads.flops_per_position * _PROMPT * (_PROMPT + 1) // 2
    return num_bytes / decode.median_s, flops / prefill.median_s


def decode_attention(model: BenchModel, kernels: Kernels) -> tuple[Callable[[], object], int]:
    """A call of it, and the bytes of keys and values that it reads."""
    heads = _heads(model) or _Heads(32, 4, 128, 128, False)
    call = _attention_call(kernels, heads, (_CONTEXT, 1), _SEQUENCES)
    return call, _SEQUENCES * _CONTEXT * heads.bytes_per_token


def _attention_call(
    kernels: Kernels, heads: _Heads, lengths: tuple[int, int], sequences: int
) -> Callable[[], object]:
    """`sequences` with `lengths` = (positions, of these rows of the call), pages in random order,
    as they are after a while."""
    positions, rows = lengths
    per_sequence = -(-positions // PAGE_TOKENS)
    pages = torch.randperm(sequences * per_sequence).view(sequences, per_sequence).tolist()
    is_prompt = rows > 1
    work = AttentionWork(
        first_row=tuple(range(0, sequences * rows, rows)),
        num_rows=(rows,) * sequences,
        first_position=(positions - rows,) * sequences,
        pages=tuple(map(tuple, pages)),
        is_prompt=(is_prompt,) * sequences,
    )
    shape = (sequences * per_sequence, heads.kv, PAGE_TOKENS)
    keys = torch.randn(*shape, heads.key_dim).bfloat16()
    values = keys[..., : heads.value_dim]
    if not heads.is_shared:
        values = torch.randn(*shape, heads.value_dim).bfloat16()
    q_THd = torch.randn(sequences * rows, heads.query, heads.key_dim)
    options = AttentionOptions(scale=heads.key_dim**-0.5, value_dim=heads.value_dim)
    stores = PagedRows(keys), PagedRows(values)
    return lambda: kernels.attention(q_THd, *stores, work, options)
