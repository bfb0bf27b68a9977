"""A job in a process of its own whose peak of memory is measured."""

from collections.abc import Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from processes import PATIENCE_S, forked, library_bytes
from windlass.build.open import open_engine
from windlass.engine.request import Request
from windlass.options import EngineOptions
from windlass.params import SamplingParams


def planned_and_peak(folder: str, case: Mapping[str, Any], backend: str) -> tuple[int, int]:
    """Bytes: what the plan adds up to, and the most that the process ever had."""
    ours, theirs = Pipe(duplex=False)
    with ours, forked(_run, folder, dict(case), backend, theirs) as process:
        theirs.close()
        planned, peak = ours.recv()
        process.join(PATIENCE_S)
        assert process.exitcode == 0
    return planned, peak


def _run(folder: str, case: dict[str, Any], backend: Any, result: Connection) -> None:
    prompts = case["prompts"]
    new = [case["new"] + case.get("longer", 0) * i for i in range(len(prompts))]
    options = EngineOptions(
        model=folder, load_format="dummy", host_memory=4 << 30, max_num_seqs=len(prompts),
        max_num_batched_tokens=case["rows"], max_model_len=max(prompts) + max(new),
        moe_expert_cache_size=case.get("moe_expert_cache_size", "1"), generation_config="vllm",
        moe_backend=backend, kv_cache_dtype=case.get("kv_cache_dtype", "auto"),
        speculative_config=case.get("speculative_config"),
    )  # fmt: skip
    libraries = library_bytes()
    with open_engine(options) as engine:
        for i, length in enumerate(prompts):
            prompt = tuple((7 * i + 13 * j) % 250 for j in range(length))
            params = SamplingParams(max_tokens=new[i], temperature=0.7, ignore_eos=True)
            engine.add(Request(str(i), prompt, params, str(i)))
        while engine.has_work:
            engine.step()
        more = max(0, library_bytes() - libraries)  # what a process that was not forked begins with
        result.send((engine.plan.host.total_bytes + more, engine.stats().peak_rss_bytes))
