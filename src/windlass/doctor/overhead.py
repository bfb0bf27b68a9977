"""What layers cost beside their products and attention: Python, leases, norms, rotation, routing,
copies, sums. Measured on the whole engine, with random weights and small experts: the time of a
pass's layers less that of the kernels that a profile has rates for."""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from windlass.build.open import open_engine
from windlass.checkpoint.synthetic import preset
from windlass.device.process_memory import resident_bytes
from windlass.doctor.timing import Timing
from windlass.engine.engine import Engine
from windlass.engine.request import Request
from windlass.kernels.interface import Kernels
from windlass.kernels.select import choose_kernels
from windlass.models.registry import read_spec
from windlass.models.spec import ModelSpec
from windlass.options import EngineOptions
from windlass.params import SamplingParams
from windlass.perf.flops import attention_row_numbers, ffn_row_numbers
from windlass.units import MIB

_LAYERS = 6
_NUM_EXPERTS, _TOP_K = 32, 8
_CONFIG = preset("qwen3-moe-1b", num_layers=_LAYERS) | {
    "moe_intermediate_size": 64, "num_experts": _NUM_EXPERTS, "num_experts_per_tok": _TOP_K,
}  # fmt: skip
_MANY, _PROMPT = 64, 32  # sequences at once, and the prompt of each
_ONE_PASSES, _MANY_PASSES = 24, 12
_WARM = 8  # passes that still read weights
_ROUNDS = 3  # of prompts; the first warms up
_ROOM = 1024 * MIB
_LEAST_S = 1e-6
_OTHER_KERNELS = ("linear", "linears", "batched_linear", "expert_ffn", "experts", "attention")


@dataclass(frozen=True, slots=True)
class Overhead:
    """`call` and `expert_s`: seconds of a module's call (attention, or the experts, of a layer) and
    of each expert in it; `row_rate`: bytes/s of what is done row by row."""

    call: Timing
    expert_s: float
    row_rate: float


class _Watched:
    """Kernels that know how long a pass's layers took beside products and attention."""

    def __init__(self, kernels: Kernels, clock: Callable[[], float]) -> None:
        self._kernels = kernels
        self._clock = clock
        self.begin()

    def begin(self) -> None:
        """A pass begins."""
        self._since: float | None = None
        self._inside = 0.0
        self.beside_s = 0.0

    def capture(self, label: Callable[[], str]) -> None:
        """What is repeated has no cost beside its calls."""

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._kernels, name)
        if name in _OTHER_KERNELS:
            return lambda *arguments, **more: self._timed(partial(call, *arguments, **more))
        if name == "normalise":
            return self._begun(call)
        return self._ended(call) if name == "combine" else call

    def _timed(self, call: Callable[[], Any]) -> Any:
        begin = self._clock()
        result = call()
        self._inside += self._clock() - begin
        return result

    def _begun(self, call: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """The first thing a layer does."""

        def run(*arguments: Any) -> torch.Tensor:
            self._since = self._clock() if self._since is None else self._since
            return call(*arguments)

        return run

    def _ended(self, call: Callable[..., None]) -> Callable[..., None]:
        """The last thing a layer does."""

        def run(*arguments: Any) -> None:
            call(*arguments)
            assert self._since is not None, "no norm before the sum of experts"
            self.beside_s = self._clock() - self._since - self._inside

        return run


def measure_overhead(
    options: EngineOptions, clock: Callable[[], float] = time.perf_counter
) -> Overhead:
    """`options`: threads, budget and kernels as they are to be measured; not used: their model."""
    threads = options.threads
    assert threads is not None, "kernels need their threads"
    kernels = _Watched(
        choose_kernels(
            options.moe_backend, threads=threads, bf16_activations=options.dtype == "bfloat16"
        ),
        clock,
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(_CONFIG), encoding="utf-8")
        options = replace(
            options, model=folder, load_format="dummy", tokenizer="demo",
            max_num_seqs=_MANY, max_num_batched_tokens=_MANY * _PROMPT + _MANY,
            max_model_len=_PROMPT + _ONE_PASSES + _WARM + 1, enable_prefix_caching=False,
        )  # fmt: skip
        with open_engine(options, kernels=kernels) as engine:
            one = _passes(engine, kernels, 1, _WARM + _ONE_PASSES)[1 + _WARM :]
            rounds = [_passes(engine, kernels, _MANY, _MANY_PASSES) for _ in range(_ROUNDS)]
    prompts = statistics.median(passes[0] for passes in rounds[1:])
    many = statistics.median(seconds for passes in rounds[1:] for seconds in passes[1:])
    return _solved(read_spec(_CONFIG)[0], one, many, prompts)


def _passes(engine: Engine, kernels: _Watched, count: int, outputs: int) -> list[float]:
    """Seconds of a layer beside products and attention: in the pass of `count` prompts, then in
    those that generate."""
    params = SamplingParams(max_tokens=outputs, temperature=0.0, ignore_eos=True, detokenize=False)
    for i in range(count):
        engine.add(Request(f"{i}", tuple(range(i, i + _PROMPT)), params, f"{i}"))
    seconds = []
    while engine.has_work:
        kernels.begin()
        engine.step()
        if kernels.beside_s:
            seconds.append(kernels.beside_s / _LAYERS)
    return seconds


def _solved(spec: ModelSpec, one: Sequence[float], many: float, prompts: float) -> Overhead:
    """Three kinds of passes for three unknowns: a row meets `_TOP_K` experts, many rows all."""
    numbers = attention_row_numbers(spec, 0) + sum(ffn_row_numbers(spec, 0))
    row_s = max(1e-12, (prompts - many) / (_MANY * _PROMPT - _MANY))
    alone = statistics.median(one)
    expert_s = max(0.0, (many - alone - (_MANY - 1) * row_s) / (_NUM_EXPERTS - _TOP_K))
    rest = row_s + _TOP_K * expert_s
    calls = tuple(max(_LEAST_S, (seconds - rest) / 2) for seconds in one)
    return Overhead(Timing(calls), expert_s, 4 * numbers / row_s)


def small_budget() -> int:
    """A budget for `measure_overhead`."""
    return resident_bytes() + _ROOM
