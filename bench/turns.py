"""The first token of a chat's second turn behind a long history: code of the project, in turn.

    python bench/turns.py --model DIR --src OLD_SRC [--history 4000] [--answer 500] [--rounds 3]

The model's first turn has `--history` random tokens and an answer of `--answer`; the second adds
32. Each run is a process of its own; runs of the code here and of `--src` take turns. Answers must
be equal. Prints a table, and what it is made of as JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parent.parent
_MESSAGE = 32  # tokens of the second turn's own


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both turns, in this process."""
    from windlass.build.open import open_engine
    from windlass.engine.request import Request
    from windlass.options import EngineOptions
    from windlass.params import SamplingParams

    longest = arguments.history + arguments.answer + _MESSAGE + 8
    options = EngineOptions(
        model=str(arguments.model), max_model_len=longest, max_num_seqs=2, generation_config="vllm",
        expert_usage="off",
    )  # fmt: skip
    history = [3 + 7 * i % 61 for i in range(arguments.history)]
    found: dict[str, Any] = {}
    with open_engine(options) as engine:
        for turn, answer in (("first", arguments.answer), ("second", 2)):
            params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=answer, logprobs=1)
            engine.add(Request(turn, tuple(history), params, turn))
            begin, first = time.perf_counter(), 0.0
            while engine.has_work:
                result = engine.step()
                if result.deltas and not first:
                    first = time.perf_counter() - begin
                for output in result.finished:
                    (one,) = output.outputs
                    history += [*one.token_ids, *range(3, 3 + _MESSAGE)]
                    found[turn] = {
                        "first_token_s": first, "cached_tokens": output.num_cached_tokens,
                        "answer": [one.token_ids, one.cumulative_logprob],
                    }  # fmt: skip
    return found


def _apart(arguments: argparse.Namespace, src: Path) -> dict[str, Any]:
    """The same in a process with the code of `src`."""
    command = [
        sys.executable, __file__, "--here", "--model", str(arguments.model),
        "--history", str(arguments.history), "--answer", str(arguments.answer),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(src)}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    """1 if answers differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--src", type=Path)
    parser.add_argument("--history", type=int, default=4000)
    parser.add_argument("--answer", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(_run(arguments)))
        return 0
    codes = {"here": _ROOT / "src", **({"before": arguments.src} if arguments.src else {})}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in codes}
    for turn in range(arguments.rounds):
        for name in list(codes)[:: 1 if turn % 2 else -1]:
            runs[name].append(_apart(arguments, codes[name]))
    answers = {json.dumps([one[turn]["answer"] for turn in one]) for own in runs.values()
               for one in own}  # fmt: skip
    print("| code | first turn, s | second turn, s | found of it, tokens |\n|---|---|---|---|")
    for name, own in runs.items():
        first, second = (
            statistics.median(one[turn]["first_token_s"] for one in own)
            for turn in ("first", "second")
        )
        print(f"| {name} | {first:.2f} | {second:.2f} | {own[0]['second']['cached_tokens']} |")
    print(json.dumps({n: [{t: o[t]["first_token_s"] for t in o} for o in own]
                      for n, own in runs.items()}))  # fmt: skip
    if len(answers) > 1:
        print("answers differ", file=sys.stderr)
    return int(len(answers) > 1)


if __name__ == "__main__":
    sys.exit(main())
