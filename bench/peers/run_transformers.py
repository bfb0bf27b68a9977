"""Runs a job with transformers: prompts in chunks of sequences through the model's own cache, then
one token of each sequence per call, as `generate` does without its bookkeeping.

Settings: dtype, experts (implementation for prompts) and experts_decode, cache ("dynamic" grows by
copying, "static" is allocated at once), chunk_tokens (of prompts in a call).
"""

import time
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from peers.job import Job, Phase, Result, Wave, run_job, whole_job


class _Engine:
    def __init__(self, job: Job) -> None:
        self._job = job
        settings = job.settings
        transformers.utils.logging.set_verbosity_error()
        torch.set_num_threads(job.threads)
        self._experts = settings.get("experts", "grouped_mm")
        self._experts_decode = settings.get("experts_decode", self._experts)
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            job.model,
            dtype=getattr(torch, settings.get("dtype", "bfloat16")),
            attn_implementation="sdpa",
            experts_implementation=self._experts,
        ).eval()
        self._chunk = max(1, settings.get("chunk_tokens", 8192) // job.prompt_tokens)

    def prefill(self, ids: torch.Tensor, limit_s: float) -> tuple[torch.Tensor, list[Cache]]:
        """The first tokens, and a cache for each chunk that was computed before the limit."""
        self._model.set_experts_implementation(self._experts)
        first: list[torch.Tensor] = []
        caches: list[Cache] = []
        phase = Phase(limit_s)
        for chunk in ids.split(self._chunk):
            cache = DynamicCache(config=self._model.config)
            logits = self._model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
            first.append(logits.logits[:, -1].argmax(-1))
            if self._job.logits and not caches:
                np.save(self._job.logits, logits.logits[0, -1].float().numpy())
            caches.append(cache)
            if phase.is_over:
                break
        return torch.cat(first), caches

    def merge(self, caches: list[Cache], count: int) -> Cache:
        """One cache for `count` sequences, those beyond the computed ones as copies; layer by
        layer, so that little is held twice."""
        config, job = self._model.config, self._job
        if self._job.settings.get("cache", "static") == "static":
            merged: Cache = StaticCache(
                config=config, max_cache_len=job.prompt_tokens + job.output_tokens
            )
        else:
            merged = DynamicCache(config=config)
        for i in range(config.num_hidden_layers):
            layers = [cache.layers[i] for cache in caches]
            keys = torch.cat([layer.keys for layer in layers])
            values = torch.cat([layer.values for layer in layers])
            for layer in layers:
                layer.keys = layer.values = None
            if len(keys) < count:
                places = torch.arange(count) % len(keys)
                keys, values = keys[places], values[places]
            merged.update(keys, values, i)
        return merged

    def begin_decode(self) -> None:
        self._model.set_experts_implementation(self._experts_decode)

    def step(self, current: torch.Tensor, cache: Cache) -> torch.Tensor:
        logits = self._model(current[:, None], past_key_values=cache, use_cache=True).logits
        return logits[:, -1].argmax(-1)


def _wave(engine: _Engine, job: Job, prompts: list[list[int]]) -> Wave:
    count, steps = len(prompts), job.output_tokens - 1
    phase = Phase(job.prefill_limit_s)
    current, caches = engine.prefill(torch.tensor(prompts), job.prefill_limit_s)
    computed = len(current)
    prefill_s = phase.seconds
    cache = engine.merge(caches, count)
    if computed == count:
        prefill_s = phase.seconds  # making the copies is no part of it
    if computed < count:  # other tokens, so that copies go ways of their own
        draw = torch.Generator().manual_seed(0)
        more = torch.randint(job.vocab_size, (count - computed,), generator=draw)
        current = torch.cat((current, more))
    tokens = [int(current[0])]
    engine.begin_decode()
    phase, done = Phase(job.decode_limit_s), 0
    while done < steps and not (phase.is_over and done):
        current = engine.step(current, cache)
        tokens.append(int(current[0]))
        done += 1
    return Wave(sequences=count, computed=computed, prefill_s=prefill_s, steps=done,
                decode_s=phase.seconds if done else 0.0, tokens=tuple(tokens))  # fmt: skip


def _run(job: Job) -> Result:
    begin = time.perf_counter()
    with torch.inference_mode():
        engine = _Engine(job)
        prompts = job.prompts()
        first, caches = engine.prefill(torch.tensor(prompts[:1]), 0)  # reads every page
        if job.output_tokens > 1:
            engine.begin_decode()
            engine.step(first, engine.merge(caches, 1))
        load_s = time.perf_counter() - begin
        waves: list[Wave] = []
        phase = Phase(job.prefill_limit_s + job.decode_limit_s)
        for start in range(0, job.sequences, job.at_once):
            if waves and phase.is_over:
                break
            waves.append(_wave(engine, job, prompts[start : start + job.at_once]))
    more = {"version": transformers.__version__, "torch": torch.__version__}
    return whole_job(job, waves, load_s=load_s, more=more)


if __name__ == "__main__":
    run_job(_run)
