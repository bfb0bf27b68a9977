"""Records how a model routes held-out text and its own answers, one sequence after the other.

    python bench/forecast_traces.py MODEL OUT.trace [--heldout FILE] [--lengths N...]

Prompts are pieces of the demo model's held-out text (`demo/data.py`), of all domains in turn for
each length; answers are sampled and as long as `--tokens` says. `windlass run-batch` itself
records. Beside the trace it leaves OUT.prompts.jsonl, whose `custom_id`s name the domains: sequence
number i of the trace is its line i.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from windlass.engine.tokenizer import load as load_tokenizer
from windlass.options import resolve_model

ROOT = Path(__file__).resolve().parent.parent
_LENGTHS = (16, 24, 32, 48, 64, 96, 128)
_SAMPLING = {"temperature": 0.7, "top_p": 0.9, "ignore_eos": True}


def prompts(documents: list[dict], encode, lengths: list[int], per_domain: int) -> list[dict]:
    """`per_domain` pieces of each length of each domain, as (custom_id, ids)."""
    chosen = random.Random(5)
    texts: dict[str, list[str]] = defaultdict(list)
    for document in documents:
        texts[document["domain"]].append(document["text"])
    found = []
    for length in lengths:
        for domain, candidates in texts.items():
            for number in range(per_domain):
                ids: list[int] = []
                while len(ids) <= length + 10:
                    ids = encode(chosen.choice(candidates))
                first = chosen.randrange(len(ids) - length)
                name = f"{domain}-{length}-{number}"
                found.append({"custom_id": name, "ids": ids[first : first + length]})
    return found


def job_lines(rows: list[dict], max_tokens: int) -> str:
    """The rows as OpenAI batch lines."""
    lines = []
    for seed, row in enumerate(rows):
        body = {"prompt": row["ids"], "max_tokens": max_tokens, "seed": seed, **_SAMPLING}
        line = {"custom_id": row["custom_id"], "method": "POST", "url": "/v1/completions"}
        lines.append(json.dumps({**line, "body": body}) + "\n")
    return "".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("model", help="a checkpoint folder, or demo")
    add("out", type=Path)
    add("--heldout", type=Path, default=ROOT / "build/demo-data/heldout.jsonl", metavar="FILE")
    add("--lengths", type=int, nargs="+", default=list(_LENGTHS), metavar="N")
    add("--per-domain", type=int, default=2, metavar="N", help="prompts of a length (default 2)")
    add("--tokens", type=int, default=96, metavar="N", help="of each answer (default 96)")
    add("--max-num-seqs", type=int, default=1, metavar="N", help="at a time (default 1)")
    add("--no-inputs", action="store_true", help="only what is chosen, not the routers' inputs")
    args = parser.parse_args()
    tokenizer = load_tokenizer(resolve_model(args.model))
    documents = [json.loads(line) for line in args.heldout.open()]
    rows = prompts(documents, tokenizer.encode, args.lengths, args.per_domain)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    job = args.out.with_suffix(".prompts.jsonl")
    job.write_text(job_lines(rows, args.tokens))
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "windlass.cli", "run-batch", "-m", args.model,
            "-i", str(job), "-o", f"{folder}/answers.jsonl",
            "--max-num-seqs", str(args.max_num_seqs), "--no-enable-prefix-caching",
            "--threads", "1",  # one row of a small model: threads would wait for each other
            "--max-model-len", str(max(args.lengths) + args.tokens),
            "--routing-trace", str(args.out),
            *(() if args.no_inputs else ("--routing-trace-inputs",)),
        ]  # fmt: skip
        subprocess.run(command, check=True)
    print(f"{args.out}: {len(rows)} prompts, {args.out.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
