"""One run of one engine: the job it is given and the result it prints, both one line of JSON.

Shared by the orchestrator and the runners, which live in other environments: standard library only.
"""

import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_SEED = 0
KEPT_TOKENS = 16  # of a result
_OOM_SCORE = Path("/proc/self/oom_score_adj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """`sequences` prompts of `prompt_tokens` random ids, each answered with `output_tokens` greedy
    tokens, the end-of-sequence token ignored; at most `at_once` side by side (0: as the engine
    plans), wave after wave.

    Runners of engines that compute all sequences in step stop a phase after its limit and scale
    what they have: `prefill_limit_s` for the prompts of a wave (the caches of the others are then
    copies), `decode_limit_s` for its steps. `settings` are the engine's own.
    """

    model: str  # a folder of safetensors, or a GGUF file
    vocab_size: int
    threads: int
    sequences: int
    at_once: int
    prompt_tokens: int
    output_tokens: int
    prefill_limit_s: float = 1e9
    decode_limit_s: float = 1e9
    settings: dict[str, Any] = field(default_factory=dict)
    # write the logits after the first prompt to this .npy file; an engine that gives only the
    # log-probabilities of some tokens writes two rows: their ids and these
    logits: str | None = None

    def prompts(self) -> list[list[int]]:
        """The same for every engine; a longer list begins with a shorter one's prompts."""
        draw = random.Random(_SEED)
        length = self.prompt_tokens
        return [
            [draw.randrange(self.vocab_size) for _ in range(length)] for _ in range(self.sequences)
        ]

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a runner measured. Seconds are of the whole job, scaled up where `share` is below 1.

    Prefill is all until every sequence has its first token, decode the steps for the others.
    """

    load_s: float
    prefill_s: float
    decode_s: float
    prefill_share: float = 1.0  # of the job's prompt tokens that were computed
    decode_share: float = 1.0  # of the tokens after each first one
    peak_rss_bytes: int
    own_rss_bytes: int
    tokens: tuple[int, ...] = ()  # of the first sequence
    more: dict[str, Any] = field(default_factory=dict)  # the engine's own

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Wave:
    """What was measured of sequences that an engine took in step; seconds of just that."""

    sequences: int
    computed: int  # of their prompts; the others got copies
    prefill_s: float
    steps: int  # after the first token
    decode_s: float
    tokens: tuple[int, ...]


def whole_job(job: Job, waves: Sequence[Wave], *, load_s: float, more: dict[str, Any]) -> Result:
    """The job's seconds from those of its waves, scaled up by what was left out."""
    steps = job.output_tokens - 1
    taken = sum(wave.sequences for wave in waves)
    prefill_s = sum(wave.prefill_s * wave.sequences / wave.computed for wave in waves)
    decode_s = sum(wave.decode_s * steps / max(1, wave.steps) for wave in waves)
    decoded = sum(wave.sequences * wave.steps for wave in waves)
    return Result(
        load_s=load_s,
        prefill_s=prefill_s * job.sequences / taken,
        decode_s=decode_s * job.sequences / taken,
        prefill_share=sum(wave.computed for wave in waves) / job.sequences,
        decode_share=decoded / (job.sequences * steps) if steps else 1.0,
        tokens=waves[0].tokens[:KEPT_TOKENS],
        more=more,
        **memory_bytes(),
    )


def memory_bytes() -> dict[str, int]:
    """Fields of a result: VmHWM of this process, in which mapped pages of files count, and what
    it holds now without such pages (RssAnon)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {
        "peak_rss_bytes": int(fields["VmHWM"].split()[0]) * 1024,
        "own_rss_bytes": int(fields["RssAnon"].split()[0]) * 1024,
    }


def run_job(run: Callable[[Job], Result]) -> None:
    """The main function of a runner: a job in the first argument, the result as the last line."""
    # where memory runs out, this process ends, not another one of the machine
    _OOM_SCORE.write_text("1000")
    job = Job(**json.loads(sys.argv[1]))
    print(run(job).to_json(), flush=True)


class Phase:
    """A clock with a limit for work done in equal parts."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._begin = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._begin

    @property
    def is_over(self) -> bool:
        return self.seconds > self._limit_s
