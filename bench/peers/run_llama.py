"""Runs a job with llama.cpp: one context, every sequence with keys and values of its own, prompts
in batches of `n_batch` tokens, then one token of each sequence per `llama_decode`.

Settings: n_batch, n_ubatch, flash_attn (-1 automatic, 0, 1), kv_unified, extra_buffers (weights
repacked for the processor where llama.cpp has such a layout), load_mode ("mmap", "none").
"""

import ctypes
import time
from collections.abc import Iterator, Sequence

import llama_cpp
import llama_cpp.llama_cpp as api
import numpy as np

from peers.job import Job, Phase, Result, Wave, run_job, whole_job

_LOAD_MODES = {"mmap": api.LLAMA_LOAD_MODE_MMAP, "none": api.LLAMA_LOAD_MODE_NONE}
_WARNING = 3  # GGML_LOG_LEVEL_WARN


@api.llama_log_callback
def _log(level: int, text: bytes, _: object) -> None:
    if _WARNING <= level <= _WARNING + 1:
        print(text.decode(errors="replace").rstrip(), flush=True)


class _Batch:
    """A reused llama_batch, filled through numpy views: Python costs little beside the engine."""

    def __init__(self, capacity: int) -> None:
        self._raw = api.llama_batch_init(capacity, 0, 1)
        self._token = np.ctypeslib.as_array(self._raw.token, (capacity,))
        self._pos = np.ctypeslib.as_array(self._raw.pos, (capacity,))
        self._count = np.ctypeslib.as_array(self._raw.n_seq_id, (capacity,))
        self._logits = np.ctypeslib.as_array(self._raw.logits, (capacity,))
        self._count[:] = 1

    def fill(
        self, tokens: np.ndarray, positions: np.ndarray, sequences: np.ndarray, wants: np.ndarray
    ) -> api.llama_batch:
        count = len(tokens)
        self._token[:count], self._pos[:count] = tokens, positions
        self._logits[:count] = wants
        for i, sequence in enumerate(sequences.tolist()):
            self._raw.seq_id[i][0] = sequence
        self._raw.n_tokens = count
        return self._raw


class _Engine:
    """A model and a context for `job`."""

    def __init__(self, job: Job) -> None:
        self._job = job
        api.llama_log_set(_log, ctypes.c_void_p())
        api.llama_backend_init()
        settings = job.settings
        params = api.llama_model_default_params()
        params.n_gpu_layers = 0
        params.load_mode = _LOAD_MODES[settings.get("load_mode", "mmap")]
        params.use_extra_bufts = settings.get("extra_buffers", True)
        self._model = api.llama_model_load_from_file(job.model.encode(), params)
        assert self._model, f"{job.model}: llama.cpp cannot load it"
        length = job.prompt_tokens + job.output_tokens
        context = api.llama_context_default_params()
        context.n_ctx = job.at_once * length
        context.n_seq_max = job.at_once
        self._n_batch = max(settings.get("n_batch", 2048), job.at_once)
        context.n_batch, context.n_ubatch = self._n_batch, settings.get("n_ubatch", 512)
        context.n_outputs_max = min(self._n_batch, max(job.at_once, 1))
        context.n_threads = context.n_threads_batch = job.threads
        context.flash_attn_type = settings.get("flash_attn", api.LLAMA_FLASH_ATTN_TYPE_AUTO)
        context.kv_unified = settings.get("kv_unified", False)
        context.no_perf = True
        self._context = api.llama_init_from_model(self._model, context)
        assert self._context, "llama.cpp cannot make the context"
        self._memory = api.llama_get_memory(self._context)
        self._batch = _Batch(self._n_batch)

    def decode(
        self, tokens: np.ndarray, positions: np.ndarray, sequences: np.ndarray, wants: np.ndarray
    ) -> np.ndarray:
        """Logits of the rows that want them, in their order. A view, valid until the next call."""
        batch = self._batch.fill(tokens, positions, sequences, wants)
        code = api.llama_decode(self._context, batch)
        assert code == 0, f"llama_decode: {code}"
        rows = int(wants.sum())
        if not rows:
            return np.empty((0, self._job.vocab_size), np.float32)
        logits = api.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (rows, self._job.vocab_size))

    def prefill(self, prompts: Sequence[Sequence[int]], limit_s: float) -> tuple[np.ndarray, int]:
        """The first token of each sequence, and how many prompts were computed before the limit."""
        length = self._job.prompt_tokens
        tokens = np.array(prompts, np.int32).reshape(-1)
        places = np.arange(tokens.size, dtype=np.int32)
        positions, sequences = places % length, places // length
        wants = positions == length - 1
        first: list[int] = []
        phase = Phase(limit_s)
        for start, end in _parts(len(prompts), length, self._n_batch):
            part = slice(start, end)
            logits = self.decode(tokens[part], positions[part], sequences[part], wants[part])
            if self._job.logits and not first and len(logits):
                np.save(self._job.logits, logits[0].copy())
            first += logits.argmax(1).tolist()
            if first and end % length == 0 and phase.is_over:
                break
        return np.array(first, np.int32), len(first)

    def copy(self, computed: int, wanted: int) -> None:
        """Gives the sequences after the first `computed` the keys and values of these."""
        for sequence in range(computed, wanted):
            api.llama_memory_seq_cp(self._memory, sequence % computed, sequence, -1, -1)

    def clear(self) -> None:
        api.llama_memory_clear(self._memory, False)


def _parts(prompts: int, length: int, n_batch: int) -> Iterator[tuple[int, int]]:
    """Ranges of tokens, each a batch: whole prompts, or parts of one where it is longer."""
    if whole := n_batch // length * length:
        for start in range(0, prompts * length, whole):
            yield start, min(start + whole, prompts * length)
        return
    for begin in range(0, prompts * length, length):
        for start in range(begin, begin + length, n_batch):
            yield start, min(start + n_batch, begin + length)


def _wave(engine: _Engine, job: Job, prompts: list[list[int]]) -> Wave:
    """Some prompts to their end."""
    engine.clear()
    count, steps = len(prompts), job.output_tokens - 1
    phase = Phase(job.prefill_limit_s)
    current, computed = engine.prefill(prompts, job.prefill_limit_s)
    prefill_s = phase.seconds
    sequences, wants = np.arange(count, dtype=np.int32), np.ones(count, bool)
    tokens, position = [int(current[0])], job.prompt_tokens

    def step() -> None:
        nonlocal current, position
        positions = np.full(count, position, np.int32)
        current = engine.decode(current, positions, sequences, wants).argmax(1).astype(np.int32)
        tokens.append(int(current[0]))
        position += 1

    if computed < count and steps > 1:
        engine.copy(computed, count)
        draw = np.random.default_rng(0)  # other tokens, so that copies go ways of their own
        more = draw.integers(0, job.vocab_size, count - computed, np.int32)
        current = np.concatenate((current, more))
        step()  # not timed: llama.cpp copies at the next call
        steps -= 1
    phase, done = Phase(job.decode_limit_s), 0
    while done < steps and not (phase.is_over and done):
        step()
        done += 1
    return Wave(sequences=count, computed=computed, prefill_s=prefill_s, steps=done,
                decode_s=phase.seconds if done else 0.0, tokens=tuple(tokens))  # fmt: skip


def _run(job: Job) -> Result:
    begin = time.perf_counter()
    engine = _Engine(job)
    if job.settings.get("warm_up", True):  # touches every page of the weights
        engine.prefill(job.prompts()[:1], 0)
    load_s = time.perf_counter() - begin
    waves: list[Wave] = []
    phase = Phase(job.prefill_limit_s + job.decode_limit_s)
    prompts = job.prompts()
    for start in range(0, job.sequences, job.at_once):
        if waves and phase.is_over:
            break
        waves.append(_wave(engine, job, prompts[start : start + job.at_once]))
    more = {
        "version": llama_cpp.__version__,
        "system": api.llama_print_system_info().decode(),
    }
    return whole_job(job, waves, load_s=load_s, more=more)


if __name__ == "__main__":
    run_job(_run)
