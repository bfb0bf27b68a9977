"""Runs a job with Windlass: through its Python API with warm weights, or, with the setting
`planned`, as `windlass run-batch` does, planned for the job and cold.

It computes prompts and answers of different sequences in the same pass, so the two are told apart
by two runs: one that ends with each first token, and the whole. A planned job is measured in one
run; its engine divides mixed passes by rows. Settings: options of the engine, `planned`, and then
`profile`: a file with the rates of this machine (default: assumed).
"""

import json
import statistics
import time
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np

from peers.job import KEPT_TOKENS, Job, Result, memory_bytes, run_job
from windlass import LLM, SamplingParams
from windlass.build.open import open_engine
from windlass.engine.engine import Engine
from windlass.engine.request import Request
from windlass.hardware.profile import HardwareProfile
from windlass.options import EngineOptions
from windlass.version import VERSION
from windlass.workload import Job as PlannedJob
from windlass.workload import Workload

_LOGPROBS = 20
_SHORT_RUNS, _SHORT_S = 3, 3.0  # runs of the first tokens, and how long they may take together
_ENOUGH_TOKENS = 32768  # of prompts in the first run: from there on its rate is the whole's


def _params(output_tokens: int) -> SamplingParams:
    return SamplingParams(
        temperature=0, max_tokens=output_tokens, ignore_eos=True, detokenize=False
    )


def _answers(llm: LLM, prompts: list[list[int]], output_tokens: int) -> tuple[float, list[int]]:
    """Seconds for all, and the first answer."""
    params = _params(output_tokens)
    rows = [{"prompt_token_ids": prompt} for prompt in prompts]
    begin = time.perf_counter()
    outputs = llm.generate(rows, params, use_tqdm=False)
    return time.perf_counter() - begin, list(outputs[0].outputs[0].token_ids)


def _prefill_s(llm: LLM, prompts: list[list[int]]) -> float:
    """Seconds of the first tokens; where they are few, the median: what is left of a run counts as
    decode, and a hiccup here would shorten it."""
    seconds = [_answers(llm, prompts, 1)[0]]
    while len(seconds) < _SHORT_RUNS and sum(seconds) < _SHORT_S:
        seconds.append(_answers(llm, prompts, 1)[0])
    return statistics.median_high(seconds)


def _save_logprobs(llm: LLM, prompt: list[int], path: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, logprobs=_LOGPROBS)
    (output,) = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
    steps = output.outputs[0].logprobs
    assert steps is not None and len(steps) == 1
    step = steps[0]
    np.save(path, np.array([list(step), [each.logprob for each in step.values()]]))


def _run(job: Job) -> Result:
    if job.settings.get("planned"):
        return _run_planned(job)
    begin = time.perf_counter()
    prompts = job.prompts()
    with LLM(
        job.model,
        threads=job.threads,
        max_num_seqs=job.at_once or None,
        max_model_len=job.prompt_tokens + job.output_tokens,
        # the second run would find the prompts of the first
        enable_prefix_caching=False,
        **job.settings,
    ) as llm:
        _answers(llm, prompts[:2], 2)  # weights are in memory as far as they go
        if job.logits:
            _save_logprobs(llm, prompts[0], job.logits)
        load_s = time.perf_counter() - begin
        enough = prompts[: max(1, _ENOUGH_TOKENS // job.prompt_tokens)]
        share = len(enough) / len(prompts)
        prefill_s = _prefill_s(llm, enough) / share
        before = llm.get_metrics()
        total_s, tokens = _answers(llm, prompts, job.output_tokens)
        after = llm.get_metrics()
        more = {
            "version": VERSION,
            "total_s": total_s,
            "passes": after.passes - before.passes,
            "bytes_read": after.bytes_read - before.bytes_read,
            "wait_s": after.wait_s - before.wait_s,
            "preemptions": after.num_preemptions - before.num_preemptions,
        }
    return Result(
        load_s=load_s,
        prefill_s=prefill_s,
        decode_s=max(0.0, total_s - prefill_s),
        prefill_share=share,
        tokens=tuple(tokens[:KEPT_TOKENS]),
        more=more,
        **memory_bytes(),
    )


def _run_planned(job: Job) -> Result:
    begin = time.perf_counter()
    settings = {name: value for name, value in job.settings.items() if name != "planned"}
    profile = _profile(settings.pop("profile", None))
    options = EngineOptions(
        model=job.model,
        threads=job.threads,
        max_num_seqs=job.at_once or None,
        max_model_len=job.prompt_tokens + job.output_tokens,
        **settings,
    )
    params, prompts = _params(job.output_tokens), job.prompts()
    work = Workload.from_lengths(job.prompt_tokens, job.output_tokens, job.sequences)
    with open_engine(options, source=_Planned(work), profile=profile) as engine:
        plan, load_s, begin = engine.plan, time.perf_counter() - begin, time.perf_counter()
        for place, prompt in enumerate(prompts):
            engine.add(Request(str(place), tuple(prompt), params, seed_key=str(place)))
        answers = _finish(engine)
        total_s, stats = time.perf_counter() - begin, engine.stats()
        check = engine.compare(stats.phases)
    assert check is not None, "a job that was planned for is compared with its prediction"
    in_order = [answers[str(place)] for place in range(len(prompts))]
    more = {
        "version": VERSION,
        "passes": stats.passes,
        "bytes_read": stats.bytes_read,
        "wait_s": stats.wait_s,
        "preemptions": stats.num_preemptions,
        "phases": stats.phases_json(),
        "plan": plan.to_json(),
        "prediction": check.to_json(),
        "rates": "assumed" if profile is None else f"measured {profile.captured}",
        "answers": blake2b(json.dumps(in_order).encode(), digest_size=16).hexdigest(),
    }
    return Result(
        load_s=load_s,
        prefill_s=stats.prefill_s,
        decode_s=max(0.0, total_s - stats.prefill_s),
        tokens=tuple(in_order[0][:KEPT_TOKENS]),
        more=more,
        **memory_bytes(),
    )


class _Planned(NamedTuple):
    """A job whose lengths are known."""

    work: Workload

    def job(self, *_: object) -> PlannedJob:
        return PlannedJob(self.work, True)

    def row_bytes(self, max_model_len: int, vocab_size: int) -> int:
        return 0  # prompts come as tokens


def _profile(path: str | None) -> HardwareProfile | None:
    if path is None:
        return None
    return HardwareProfile.from_json(json.loads(Path(path).read_text(encoding="utf-8")))


def _finish(engine: Engine) -> Mapping[str, list[int]]:
    """Answers by request id."""
    found: dict[str, list[int]] = {}
    while engine.has_work:
        for output in engine.step().finished:
            assert output.error is None, output.error
            found[output.request_id] = list(output.outputs[0].token_ids)
    return found


if __name__ == "__main__":
    run_job(_run)
