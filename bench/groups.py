"""What a pass in several groups of rows reads, and what it takes, on a CPU alone.

    python bench/groups.py [--sequences N] [--tokens N] [--json FILE]

The demo model answers many requests at once, in one, two and three groups, with slots for fewer
experts than a layer has, for as many, and for more. Answers must be the same.
"""

import argparse
from pathlib import Path
from typing import Any

from limits import run_bench
from machine import Others, describe, table

from windlass.build.open import open_engine
from windlass.engine.request import Request
from windlass.options import EngineOptions
from windlass.params import SamplingParams

_GROUPS = (1, 2, 3)


def _run(slots: int, groups: int, options: argparse.Namespace) -> dict[str, Any]:
    """`slots`: experts in memory, per layer."""
    engine = open_engine(EngineOptions(
        model="demo", moe_expert_cache_size=str(slots), batch_groups=groups, micro_batch_size=64,
        max_num_seqs=options.sequences, max_num_batched_tokens=options.sequences + 128,
        max_model_len=256, expert_forecast="usage",
    ))  # fmt: skip
    params = SamplingParams(max_tokens=options.tokens, temperature=0.0, ignore_eos=True)
    for i in range(options.sequences):
        engine.add(Request(str(i), tuple(range(10 + i, 18 + i)), params, str(i)))
    texts: dict[str, tuple[int, ...]] = {}
    while engine.has_work:
        for output in engine.step().finished:
            texts[output.request_id] = tuple(output.outputs[0].token_ids)
    stats = engine.stats()
    engine.close()
    return {
        "slots": slots, "groups": groups, "bytes_read": stats.bytes_read, "passes": stats.passes,
        "pass_s": stats.pass_s, "texts": hash(tuple(sorted(texts.items()))),
    }  # fmt: skip


def bench(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All of it."""
    others = Others()
    runs = [_run(slots, groups, options) for slots in options.slots for groups in _GROUPS]
    assert len({run["texts"] for run in runs}) == 1, "answers differ"
    rows = []
    for one in (run for run in runs if run["groups"] == 1):
        same = [run for run in runs if run["slots"] == one["slots"]]
        cells = (f"{run['bytes_read'] / one['bytes_read']:.2f}" for run in same)
        seconds = (f"{1e3 * run['pass_s'] / run['passes']:.1f}" for run in same)
        rows.append([str(one["slots"]), f"{one['bytes_read'] / 2**20:.1f}", *cells, *seconds])
    heads = ("slots a layer", "MiB read", *(f"read, {g}" for g in _GROUPS),
             *(f"ms a pass, {g}" for g in _GROUPS))  # fmt: skip
    print(table(heads, rows))
    return {"bench": "groups", **describe(), "others_cores": round(others.cores(), 2), "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description="Passes in groups of rows.")
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="also write the results here")
    add("--dir", type=Path, help=argparse.SUPPRESS)
    add("--sequences", type=int, default=192, metavar="N", help="at once (default: 192)")
    add("--tokens", type=int, default=6, metavar="N", help="of each answer (default: 6)")
    add("--slots", type=int, nargs="+", default=[1, 4, 8, 12, 24], metavar="N",
        help="experts in memory, per layer (of 24)")  # fmt: skip
    run_bench(parser.parse_args(), bench)


if __name__ == "__main__":
    main()
