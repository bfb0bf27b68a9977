"""Decode of one sequence with and without guesses, on the demo model and three kinds of text.

    python bench/drafts.py [--rounds N] [--output-tokens N] [--json FILE] [--quick]

Everything in memory, then a third of the experts, the rest read from disk. `off`: without guesses;
`on`: as users get them; `always`: every guess computed, whatever it costs. One engine of each kind,
a round of each kind in turn; all must give the same answer. Rates are tokens per second of decode,
medians over rounds; the first round, in which the engines warm up, is told apart.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from machine import Others, describe, table, write

from windlass.build.open import open_engine
from windlass.engine.drafting import Drafting
from windlass.engine.drafts import PromptLookup
from windlass.engine.engine import Engine
from windlass.engine.request import Request
from windlass.engine.sequence import Sequence
from windlass.options import EngineOptions
from windlass.params import SamplingParams
from windlass.speculative import SpeculativeConfig
from windlass.units import GIB

_TEXTS = {
    "records": "".join(
        f'{{"name": "{name}", "age": {age}, "city": "Berlin"}}\n'
        for age, name in enumerate(("Anna", "Bert", "Carl", "Dora"), 30)
    ),
    "code": "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n\n\ndef mul(",
    "prose": "The history of the town begins with a river, and with people who",
}
_CONFIG = SpeculativeConfig(method="ngram")
_EXPERTS = {"all in memory": None, "a third in memory": "8"}


class _Always(Drafting):
    """Computes all that is guessed."""

    def propose(self, sequence: Sequence) -> tuple[int, ...]:
        return self._follow(sequence).drafter.guess(self.most).token_ids


def _open(kind: str, experts: str | None) -> Engine:
    options = EngineOptions(
        host_memory=2 * GIB, max_num_seqs=2, max_model_len=1024, moe_expert_cache_size=experts,
        speculative_config=None if kind == "off" else _CONFIG, generation_config="vllm",
    )  # fmt: skip
    engine = open_engine(options)
    if kind == "always":
        always = _Always(_CONFIG.num_speculative_tokens, lambda: PromptLookup(_CONFIG))
        engine._admission._drafting = always
    return engine


def _run(engine: Engine, text: str, tokens: int, temperature: float) -> tuple[float, Any]:
    """Tokens per second after the prompt's pass, and the answer."""
    params = SamplingParams(max_tokens=tokens, temperature=temperature, ignore_eos=True, seed=1)
    engine.add(Request("a", tuple(engine.tokenizer.encode(text)), params, "a"))
    engine.step()
    begin = time.perf_counter()
    while engine.has_work:
        finished = engine.step().finished
    return (tokens - 1) / (time.perf_counter() - begin), finished[0].outputs[0].token_ids


def bench(
    experts: str | None, text: str, temperature: float, options: argparse.Namespace
) -> dict[str, Any]:
    """One text, all kinds in turn."""
    kinds = ("off", "on", "always")
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    engines = {kind: _open(kind, experts) for kind in kinds}
    others = Others()
    try:
        for number in range(options.rounds):
            answers = set()
            for kind in kinds[:: 1 if number % 2 == 0 else -1]:
                rate, answer = _run(engines[kind], text, options.output_tokens, temperature)
                rates[kind].append(rate)
                answers.add(answer)
            assert len(answers) == 1, "answers differ"
        stats = engines["on"].stats().drafts
        assert stats is not None, "the engine guesses"
    finally:
        for engine in engines.values():
            engine.close()
    later = {kind: statistics.median(found[1:] or found) for kind, found in rates.items()}
    return {
        **{f"{kind}_tokens_per_s": round(rate, 1) for kind, rate in later.items()},
        "gain": round(later["on"] / later["off"], 3),
        "gain_always": round(later["always"] / later["off"], 3),
        "gain_first": round(rates["on"][0] / rates["off"][0], 3),
        "proposed": stats.proposed, "accepted": stats.accepted, "note": stats.note,
        "others_cores": round(others.cores(), 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Decode with and without guesses.")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--output-tokens", type=int, default=400, metavar="N", help="default: 400")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--quick", action="store_true", help="says only that the script works")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.output_tokens = 1, 16
    document: dict[str, Any] = {"bench": "drafts", **describe(), "runs": []}
    for memory, experts in _EXPERTS.items():
        for name, text in _TEXTS.items():
            for temperature in (0.0, 0.8):
                row = {"memory": memory, "text": name, "temperature": temperature}
                document["runs"].append(row | bench(experts, text, temperature, options))
                print(json.dumps(document["runs"][-1]), flush=True)
    names = ("memory", "text", "temperature", "off_tokens_per_s", "on_tokens_per_s", "gain",
             "gain_always", "gain_first", "proposed", "accepted")  # fmt: skip
    print(table(names, [[str(run[name]) for name in names] for run in document["runs"]]))
    write(document, options.json)


if __name__ == "__main__":
    main()
