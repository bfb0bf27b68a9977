"""Runs a job with Windlass through its Python API.

It computes prompts and answers of different sequences in the same pass, so the two are told apart
by two runs: one that ends with each first token, and the whole. Settings: keywords of `LLM`, and
`warm_up` (default: yes, so that weights are in memory as far as they go).
"""

import time
from dataclasses import asdict

import numpy as np

from peers.job import KEPT_TOKENS, Job, Result, memory_bytes, run_job
from windlass import LLM, SamplingParams
from windlass.version import VERSION

_LOGPROBS = 20
_ENOUGH_TOKENS = 32768  # of prompts in the first run: from there on its rate is the whole's


def _answers(llm: LLM, prompts: list[list[int]], output_tokens: int) -> tuple[float, list[int]]:
    """Seconds for all, and the first answer."""
    params = SamplingParams(
        temperature=0, max_tokens=output_tokens, ignore_eos=True, detokenize=False
    )
    rows = [{"prompt_token_ids": prompt} for prompt in prompts]
    begin = time.perf_counter()
    outputs = llm.generate(rows, params, use_tqdm=False)
    return time.perf_counter() - begin, list(outputs[0].outputs[0].token_ids)


def _save_logprobs(llm: LLM, prompt: list[int], path: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, logprobs=_LOGPROBS)
    (output,) = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
    (step,) = output.outputs[0].logprobs
    np.save(path, np.array([list(step), [each.logprob for each in step.values()]]))


def _run(job: Job) -> Result:
    begin = time.perf_counter()
    settings = dict(job.settings)
    is_warm, wants_prefill = settings.pop("warm_up", True), settings.pop("prefill", True)
    prompts = job.prompts()
    with LLM(
        job.model,
        threads=job.threads,
        max_num_seqs=job.at_once or None,
        max_model_len=job.prompt_tokens + job.output_tokens,
        # the second run would find the prompts of the first
        enable_prefix_caching=False,
        **settings,
    ) as llm:
        if is_warm:
            _answers(llm, prompts[:2], 2)
        if job.logits:
            _save_logprobs(llm, prompts[0], job.logits)
        load_s = time.perf_counter() - begin
        prefill_s, share = 0.0, 0.0
        if wants_prefill:
            enough = prompts[: max(1, _ENOUGH_TOKENS // job.prompt_tokens)]
            share = len(enough) / len(prompts)
            prefill_s = _answers(llm, enough, 1)[0] / share
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
            "plan": asdict(llm.plan),
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


if __name__ == "__main__":
    run_job(_run)
