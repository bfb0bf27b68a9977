"""Engines over tiny random checkpoints, for tests of everything below the fronts."""

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from amounts import rarely
from delta_model import DELTA_CASES, make_delta_checkpoint
from fake_cuda import FakeCuda, on_device
from families import ALIKE, CASES, VOCAB, make_checkpoint
from windlass.build.open import open_engine
from windlass.device.base import Device
from windlass.engine.engine import Engine
from windlass.engine.outputs import RequestOutput
from windlass.engine.request import Request
from windlass.engine.sequence import Sequence
from windlass.kernels.interface import Kernels
from windlass.kernels.reference import TorchKernels
from windlass.options import EngineOptions
from windlass.params import SamplingParams
from windlass.units import MIB

FAMILIES = (*CASES, *DELTA_CASES)
GOLDEN = (*FAMILIES, *ALIKE)
# One of each kind of attention or recurrence; the other families differ in what is around it.
OF_A_KIND = (
    "qwen3_moe", "deepseek_v3", "gpt_oss", "gemma4_text", "lfm2_moe", "nemotron_h", "qwen3_next",
)  # fmt: skip
BY_KIND = [*OF_A_KIND, *rarely(one for one in FAMILIES if one not in OF_A_KIND)]
_MADE: dict[str, tuple[torch.nn.Module, dict[str, bytes]]] = {}


def make_model(family: str, path: Path, **changes: Any) -> torch.nn.Module:
    """A random checkpoint with a tokenizer beside it; returns transformers' model, which is not to
    be changed: a process makes each once."""
    key = repr((family, sorted(changes.items())))
    if key not in _MADE:
        make = make_delta_checkpoint if family in DELTA_CASES else make_checkpoint
        with tempfile.TemporaryDirectory() as folder:
            made = make(family, Path(folder), **changes)
            write_tokenizer(Path(folder))
            files = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
        _MADE[key] = made, files
    model, files = _MADE[key]
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        (path / name).write_bytes(content)
    return model


def write_tokenizer(path: Path) -> None:
    """One word per id: `w0 w1 w2 ...`."""
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(path / "tokenizer.json"))


def engine_for(
    path: Path, *, device: Device | None = None, kernels: Kernels | None = None, **options: Any
) -> Engine:
    """An engine with room for everything, unless `options` say otherwise."""
    options.setdefault("host_memory", 4 * 1024 * MIB)
    options.setdefault("max_model_len", 256)
    options.setdefault("max_num_seqs", 8)
    options.setdefault("max_num_batched_tokens", 512)
    options.setdefault("generation_config", "vllm")
    return open_engine(EngineOptions(model=str(path), **options), device=device, kernels=kernels)


@contextmanager
def engine_on(device: FakeCuda, path: Path, **options: Any) -> Iterator[Engine]:
    """The same on `device`, by torch's kernels."""
    options.setdefault("moe_backend", "torch")
    kernels = on_device(device, TorchKernels)
    with device.watched(), engine_for(path, device=device, kernels=kernels, **options) as engine:
        engine._weights._queue.changed.wait = device.wait  # type: ignore[method-assign]
        yield engine


def request(name: str, prompt: Iterable[int], *, max_tokens: int = 8, **params: Any) -> Request:
    """A greedy request that does not end early, unless `params` say otherwise."""
    settings = {"temperature": 0.0, "ignore_eos": True, **params}
    return Request(name, tuple(prompt), SamplingParams(max_tokens=max_tokens, **settings), name)


def run_all(
    engine: Engine, requests: Iterable[Request], *, check: bool = True
) -> dict[str, RequestOutput]:
    """Adds all requests, steps to the end; results by request id."""
    for one in requests:
        engine.add(one)
    results: dict[str, RequestOutput] = {}
    while engine.has_work:
        for output in engine.step().finished:
            results[output.request_id] = output
        if check:
            engine.check()
    return results


def kept_cells(engine: Engine, sequence: Sequence, count: int) -> list[torch.Tensor]:
    """Keys and values of the first `count` tokens of a running sequence, in all layers."""
    kv, found = engine._admission._kv.device, []
    for layer in kv._keys:
        for rows in kv.stored(layer):
            for tensor in (rows.rows_PKBd, rows.scales_PKB):
                if tensor is not None:
                    flat = tensor[sequence.pages].transpose(1, 2).flatten(0, 1)
                    found.append(flat[:count].clone())
    return found


def logprob_rows(output: RequestOutput) -> torch.Tensor:
    """(steps, vocabulary) of the first choice of a request with logprobs=-1."""
    steps = output.outputs[0].logprobs
    assert steps is not None
    rows = [[step[token].logprob for token in range(len(step))] for step in steps]
    return torch.tensor(rows, dtype=torch.float64)


def prompts(lengths: Iterable[int], *, seed: int = 0) -> list[list[int]]:
    """Random token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]
