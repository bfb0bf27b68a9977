"""Windlass beside llama.cpp and transformers: one command for all of it.

    python -m bench.peers [--json FILE [--resume]] [--quick] ...

Writes random checkpoints and their GGUF twins, checks that they are one model, finds each engine's
best settings, measures engines in turn on the same prompts, threads and lengths, and the same with
less memory than the weights need. bench/README.md says how the numbers are made.
"""

import argparse
import os
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from machine import ROOT, Others, Rates, describe, head, measure_rates, set_threads, write

from peers import launch, models, report
from peers.document import Document, StopAfter
from peers.limited import LEAST_BYTES, Limited, LimitedWish
from peers.measure import CONTENDERS, Comparison, Contender, Wish, cases
from peers.models import TWINS, Model
from windlass.errors import UsageError
from windlass.plan import SCHEDULES
from windlass.units import format_bytes, parse_bytes

_STAGES = ("check", "memory", "limited")
_MODELS = models.FULL_MODELS + models.CUT_MODELS + models.QUICK_MODELS


def _limit(text: str) -> int:
    try:
        limit = parse_bytes(text, what="limit")
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if limit < LEAST_BYTES:
        least = format_bytes(LEAST_BYTES)
        raise argparse.ArgumentTypeError(f"limit: got {text}, allowed {least} or more")
    return limit


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers", description="Windlass beside llama.cpp and transformers."
    )
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="write the results here, after every run")
    add("--resume", action="store_true", help="keep what FILE has, measure the rest")
    add("--retry", action="store_true", help="with --resume: runs that failed or took too long too")
    add("--again", nargs="+", default=[], choices=launch.ENGINES, metavar="ENGINE",
        help="with --resume: measure these engines anew")  # fmt: skip
    add("--stop-after", type=float, default=1e9, metavar="S", help="begin no run after this time")
    add("--quick", action="store_true", help="two tiny models, some minutes")
    add("--dir", type=Path, default=ROOT / "out" / "peers", help="keeps the models")
    add("--remove", action="store_true", help="delete a model's files after its last run")
    add("--only", nargs="+", choices=_STAGES, default=_STAGES, metavar="STAGE",
        help="of check (twins are one model), memory (all in it), limited (less)")  # fmt: skip
    add("--models", nargs="+", metavar="NAME", choices=_MODELS,
        help=f"of {', '.join(_MODELS)} (default: {', '.join(models.FULL_MODELS)})")  # fmt: skip
    add("--engines", nargs="+", choices=launch.ENGINES, default=launch.ENGINES, metavar="ENGINE",
        help=f"of {', '.join(launch.ENGINES)}")  # fmt: skip
    add("--formats", nargs="+", choices=tuple(TWINS), default=tuple(TWINS), metavar="FORMAT",
        help=f"of {', '.join(TWINS)}; the other engines' of the same size with them")  # fmt: skip
    add("--sequences", nargs="+", type=int, metavar="N", help="default: 1 16 64 256")
    add("--prompts", nargs="+", type=int, metavar="N", help="prompt tokens (default: 128 512)")
    add("--output-tokens", type=int, metavar="N", help="default: 64")
    add("--rounds", type=int, metavar="N", help="of each case (default: 3)")
    add("--threads", type=int, metavar="N", help="of every engine (default: all cores)")
    add("--timeout", type=float, default=1500.0, metavar="S", help="of a run (default: 1500)")
    add("--phase", type=float, default=120.0, metavar="S",
        help="the peers' prefill or decode is scaled up after this (default: 120)")  # fmt: skip
    add("--case", type=float, default=600.0, metavar="S",
        help="begin no further round of a case after this (default: 600)")  # fmt: skip
    add("--requests", type=int, metavar="N", help="of the limited job (default: 256)")
    add("--limited-output-tokens", type=int, default=16, metavar="N", help="default: 16")
    add("--limited-timeout", type=float, default=3600.0, metavar="S", help="default: 3600")
    add("--windlass-sequences", nargs="+", type=int, default=[0], metavar="N",
        help="tried in the limited job; 0: as planned (default)")  # fmt: skip
    add("--limit", type=_limit, metavar="SIZE",
        help="memory of the limited job (default: a third of the checkpoint)")  # fmt: skip
    add("--schedules", nargs="+", choices=SCHEDULES, default=SCHEDULES[:1], metavar="NAME",
        help=f"of Windlass's limited job: {', '.join(SCHEDULES)} (default: first)")  # fmt: skip
    add("--skip-alone", action="store_true", help="no limited run of one request")
    add("--llama-sequences", nargs="+", type=int, metavar="N",
        help="of llama.cpp in the limited job, tried (default: 8 16 32 64 128)")  # fmt: skip
    options = parser.parse_args()
    quick = options.quick
    options.models = options.models or (models.QUICK_MODELS if quick else models.FULL_MODELS)
    options.sequences = options.sequences or ([4] if quick else [1, 16, 64, 256])
    options.prompts = options.prompts or ([32] if quick else [128, 512])
    options.output_tokens = options.output_tokens or (4 if quick else 64)
    options.rounds = options.rounds or (1 if quick else 3)
    options.llama_sequences = options.llama_sequences or ([2, 8] if quick else [8, 16, 32, 64, 128])
    options.requests = options.requests or (8 if quick else 256)
    if options.json and options.json.exists() and not options.resume:
        parser.error(f"{options.json} exists: give --resume to go on with it, or another name")
    return options


def _contenders(options: argparse.Namespace) -> tuple[Contender, ...]:
    forms = {*options.formats, *(TWINS[form] for form in options.formats)}
    forms |= {form + models.ROUNDED for form in options.formats}
    forms |= {"best"} if "bf16" in options.formats else set()
    return tuple(c for c in CONTENDERS if c.engine in options.engines and c.form in forms)


def _wish(options: argparse.Namespace, threads: int) -> Wish:
    return Wish(
        contenders=_contenders(options), sequences=tuple(options.sequences),
        prompts=tuple(options.prompts), output_tokens=options.output_tokens,
        rounds=options.rounds, threads=threads, timeout_s=options.timeout,
        phase_s=options.phase, case_s=options.case,
    )  # fmt: skip


def _limited_wish(options: argparse.Namespace, threads: int) -> LimitedWish:
    return LimitedWish(
        requests=options.requests, prompt_tokens=min(options.prompts),
        output_tokens=options.limited_output_tokens, threads=threads,
        llama_sequences=tuple(options.llama_sequences),
        windlass_sequences=tuple(options.windlass_sequences),
        schedules=tuple(options.schedules), limit_bytes=options.limit,
        has_alone=not options.skip_alone, is_quick=options.quick,
        timeout_s=options.limited_timeout, phase_s=options.phase,
    )  # fmt: skip


def _run_model(
    model: Model, options: argparse.Namespace, comparison: Comparison, limited: Limited
) -> None:
    available = comparison.available(model)
    if "check" in options.only:
        comparison.check(model, available)
    if "memory" in options.only:
        for prompt, sequences in cases(comparison.hint):
            comparison.run_case(model, available, prompt, sequences)
    if "limited" in options.only:
        engines = [c.engine for c in available if c.form == "bf16"]
        limited.run(model, engines)
    if options.remove:
        shutil.rmtree(model.folder)


def _measure(options: argparse.Namespace, document: Document, threads: int) -> bool:
    """True where all was done."""
    comparison = Comparison(document, _wish(options, threads))
    limited = Limited(document, _limited_wish(options, threads))
    try:
        for name in options.models:
            _run_model(models.load(name, options.dir), options, comparison, limited)
    except StopAfter:
        return False
    return True


def _head(options: argparse.Namespace) -> tuple[dict[str, Any], Rates]:
    rates = measure_rates(quick=options.quick)
    document = {"bench": "peers", **describe(), "rates": rates.to_json()}
    document["command"] = shlex.join(["python", "-m", "bench.peers", *sys.argv[1:]])
    if options.quick:
        document["quick"] = "tiny models: says only that the script works"
    return document, rates


def main() -> None:
    options = _parse()
    # ends through the clean-up: a memory group outlives its process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.chdir(ROOT)
    threads, begin, others = set_threads(options.threads), time.monotonic(), Others()
    if set(options.engines) != {"windlass"}:
        launch.ensure_environment()
    options.dir.mkdir(parents=True, exist_ok=True)
    described, rates = _head(options)
    print(head(described, rates), flush=True)
    document = Document(options.json, described, stop_after_s=options.stop_after)
    if document.data["machine"]["threads"] != threads:
        sys.exit(f"{options.json}: measured with other --threads")
    document.forget(engines=options.again, retry=options.retry)
    is_whole = _measure(options, document, threads)
    part = document.data["parts"][-1]
    part["others_cores"], part["seconds"] = others.cores(), time.monotonic() - begin
    document.data["aims"] = report.aims(document.data)
    print("\n" + report.show(document.data))
    if not is_whole:
        print(f"\nstopped after {options.stop_after:.0f} s: give --resume to go on")
    print(f"\n{part['others_cores']:.2f} cores busy with other processes")
    document.save()
    write(document.data, None)
