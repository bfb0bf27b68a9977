"""Tables for people from a document of a comparison, and what became of the aims."""

import statistics
from collections.abc import Sequence
from typing import Any

from machine import table

from peers.models import CUT_MODELS, TWINS
from windlass.units import format_bytes

# Windlass's format -> what it is compared with, and the least ratio of total throughput aimed at
# with 64 sequences
_AIMS_AT_64 = {
    ("windlass bf16", "llama.cpp bf16"): 2.5,
    ("windlass bf16", "transformers best"): 2.2,
    ("windlass int8", "llama.cpp q8_0"): 1.5,
    ("windlass int4", "llama.cpp q4_0"): 1.5,
}
_AIM_LIMITED, _AIM_LIMITED_ALONE = 2.0, 5.0
_AIM_CUT, _AIM_CUT_BOUND = 1.5, 0.85  # of models of CUT_MODELS, many requests
_OTHERS_CORES = 0.1  # kept busy by other processes: above, the numbers are theirs too
_OF_LLAMA = {theirs: ours for ours, theirs in TWINS.items()}

Case = tuple[str, int, int]  # model, prompt tokens, sequences


def our_twin(engine: str, form: str) -> str | None:
    """Windlass's row beside another engine's."""
    if engine == "windlass":
        return None
    return f"windlass {_OF_LLAMA.get(form, 'bf16')}"


class Cells:
    """Rates of a case by contender: medians over rounds."""

    def __init__(self, entries: Sequence[dict[str, Any]]) -> None:
        self._by_name: dict[str, list[dict[str, Any]]] = {}
        for entry in entries:
            self._by_name.setdefault(f"{entry['engine']} {entry['form']}", []).append(entry)

    def names(self) -> list[str]:
        return list(self._by_name)

    def entries(self, name: str) -> list[dict[str, Any]]:
        return self._by_name[name]

    def rates(self, name: str) -> dict[str, float] | None:
        """Tokens per second; None where nothing was measured."""
        done = [entry for entry in self._by_name.get(name, ()) if entry["result"] is not None]
        if not done:
            return None
        each = [_rates(entry) for entry in done]
        medians = {key: statistics.median(rates[key] for rates in each) for key in each[0]}
        totals = [rates["total"] for rates in each]
        return medians | {"spread": (max(totals) - min(totals)) / medians["total"]}

    def ratio(self, ours: str, theirs: str, key: str) -> float | None:
        mine, other = self.rates(ours), self.rates(theirs)
        if mine is None or other is None or not other[key]:
            return None
        return mine[key] / other[key]


def _rates(entry: dict[str, Any]) -> dict[str, float]:
    result, count = entry["result"], entry["sequences"]
    prompt, output = entry["prompt_tokens"], entry["output_tokens"]
    prefill_s, decode_s = result["prefill_s"], result["decode_s"]
    return {
        "prefill": count * prompt / prefill_s,
        "decode": count * (output - 1) / decode_s if decode_s else 0.0,
        "total": count * (prompt + output) / (prefill_s + decode_s),
    }


def cases(document: dict[str, Any]) -> dict[Case, Cells]:
    found: dict[Case, list[dict[str, Any]]] = {}
    for entry in document["runs"]:
        case = (entry["model"], entry["prompt_tokens"], entry["sequences"])
        found.setdefault(case, []).append(entry)
    return {case: Cells(entries) for case, entries in found.items()}


def _note(entries: Sequence[dict[str, Any]]) -> str:
    """What a reader must know of a row."""
    last = entries[-1]
    if last["result"] is None:
        return f"{last['status']}: {last['message']}"[:60]
    notes = []
    result, settings = last["result"], last["settings"]
    if "dtype" in settings:
        notes.append(settings["dtype"])
    if 0 < last["at_once"] < last["sequences"]:
        notes.append(f"{last['at_once']} at once")
    for phase in ("prefill", "decode"):
        share = min(e["result"][f"{phase}_share"] for e in entries if e["result"])
        if share < 0.999:
            notes.append(f"{phase} from {100 * share:.0f} %")
    if result["more"].get("bytes_read"):
        notes.append(f"read {format_bytes(result['more']['bytes_read'])}")
    others = max(e["others_cores"] for e in entries)
    return ", ".join(notes + ([f"others {others:.1f} cores"] if others > _OTHERS_CORES else []))


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} x"


def case_table(case: Case, cells: Cells) -> str:
    """One row per contender; ratios are Windlass's rate in the same format over the row's."""
    model, prompt, sequences = case
    rows = []
    for name in cells.names():
        rates, entries = cells.rates(name), cells.entries(name)
        if rates is None:
            rows.append([name, *[""] * 7, _note(entries)])
            continue
        ours = our_twin(entries[0]["engine"], entries[0]["form"])
        done = [entry["result"]["peak_rss_bytes"] for entry in entries if entry["result"]]
        rows.append([
            name, f"{rates['prefill']:.1f}", f"{rates['decode']:.1f}", f"{rates['total']:.1f}",
            f"{100 * rates['spread']:.0f} %, {len(done)}", format_bytes(max(done)),
            _ratio(cells.ratio(ours, name, "total") if ours else None),
            _ratio(cells.ratio(ours, name, "decode") if ours else None), _note(entries),
        ])  # fmt: skip
    heads = (f"{model}, prompt {prompt}, {sequences} sequences", "prefill/s", "decode/s",
             "total tokens/s", "spread, rounds", "peak memory", "Windlass, total",
             "Windlass, decode", "notes")  # fmt: skip
    return table(heads, rows)


def limited_table(model: str, entries: Sequence[dict[str, Any]], *, checkpoint_bytes: int) -> str:
    """One row per run; ratios are Windlass's rate, by its default schedule, over the row's."""
    rows = []
    for entry in entries:
        name = f"{_runner(entry)}, {entry['requests']} requests"
        if entry["total_s"] is None:
            rows.append([name, *[""] * 6, f"{entry['status']}: {entry['message']}"[:60]])
            continue
        ratio = None
        if _runner(entry) != "windlass":
            ratio = limited_ratio(entries, _runner(entry), alone=entry["requests"] == 1)
        tokens = entry["requests"] * (entry["prompt_tokens"] + entry["output_tokens"])
        share = _share_of_bound(entry)
        rows.append([
            name, str(entry["at_once"] or "planned"), f"{entry['total_s']:.1f}",
            f"{tokens / entry['total_s']:.1f}", "" if share is None else f"{100 * share:.0f} %",
            _ratio(ratio), format_bytes(entry["result"]["peak_rss_bytes"]),
            ", ".join(_limited_notes(entry, checkpoint_bytes)),
        ])  # fmt: skip
    limit = format_bytes(entries[0]["limit_bytes"])
    heads = (f"{model} in {limit}", "at once", "s", "tokens/s", "of the bound", "Windlass, total",
             "peak memory", "notes")  # fmt: skip
    return table(heads, rows)


def _limited_notes(entry: dict[str, Any], checkpoint_bytes: int) -> list[str]:
    """What a reader must know of a run that ended."""
    result, more = entry["result"], entry["result"]["more"]
    notes = [] if entry["limited"]["no_cgroup"] is None else ["no cgroup, not enforced"]
    if entry["engine"] == "windlass":
        notes.append(f"read {format_bytes(more['bytes_read'])}")
    # Windlass's job is measured in one piece
    elif result["prefill_share"] + result["decode_share"] < 1.99:
        notes.append(f"from {100 * result['prefill_share']:.0f} % of prompts, "
                     f"{100 * result['decode_share']:.0f} % of decoding")  # fmt: skip
    if "prediction" in more:
        total = more["prediction"]["phases"]["total"]
        lanes = [f"{lane} {100 * s:.0f} %" for lane, s in total["shares_of_bound"].items()]
        notes.append(f"least time of {', '.join(lanes)}; predicted {total['predicted_s']:.1f} s")
        notes += ["rates assumed"] if more["rates"] == "assumed" else []
    if not entry["is_third"]:
        notes.append(f"memory of {100 * entry['limit_bytes'] / checkpoint_bytes:.0f} % of weights")
    if entry["others_cores"] > _OTHERS_CORES:
        notes.append(f"others {entry['others_cores']:.1f} cores")
    return notes


def _runner(entry: dict[str, Any]) -> str:
    """The engine, and its schedule where that is not the default."""
    schedule = entry["settings"].get("schedule")
    return f"{entry['engine']} {schedule}" if schedule else str(entry["engine"])


def _share_of_bound(entry: dict[str, Any]) -> float | None:
    """How near a run came to what binds each phase; None where nothing was predicted."""
    prediction = (entry["result"] or {"more": {}})["more"].get("prediction")
    return prediction and float(prediction["share_of_bound"])


def limited_ratio(
    entries: Sequence[dict[str, Any]], theirs: str = "llama.cpp", *, alone: bool
) -> float | None:
    """Their seconds over Windlass's, for all requests or for one alone."""
    seconds = {
        _runner(entry): entry["total_s"] for entry in entries if (entry["requests"] == 1) == alone
    }
    ours, other = seconds.get("windlass"), seconds.get(theirs)
    return other / ours if ours and other else None


def aims(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Every aim that this document says something about; `ratio` None: not measured."""
    found: list[dict[str, Any]] = []

    def add(text: str, wanted: float, ratio: float | None) -> None:
        is_met = None if ratio is None else ratio >= wanted
        found.append({"aim": text, "wanted": wanted, "ratio": ratio, "is_met": is_met})

    if "quick" in document:
        return found
    for (model, prompt, sequences), cells in cases(document).items():
        for (ours, theirs), wanted in _AIMS_AT_64.items():
            where = f"{model}, prompt {prompt}: {ours} over {theirs}"
            if sequences == 64:
                add(f"{where}, total, 64 sequences", wanted, cells.ratio(ours, theirs, "total"))
            if sequences == 1 and theirs.startswith("llama.cpp"):
                add(f"{where}, decode, 1 sequence", 1.0, cells.ratio(ours, theirs, "decode"))
    for (model, limit), entries in limited(document).items():
        many = limited_ratio(entries, alone=False)
        where = f"{model} in {format_bytes(limit)}"
        if model in CUT_MODELS:
            add(f"{where}: many requests, over llama.cpp", _AIM_CUT, many)
            shares = [
                _share_of_bound(entry) for entry in entries
                if _runner(entry) == "windlass" and entry["requests"] > 1
            ]  # fmt: skip
            add(f"{where}: disk, share of the bound", _AIM_CUT_BOUND, (shares or [None])[-1])
        elif entries[0]["is_third"]:
            add(f"{model} in a third: many requests, over llama.cpp", _AIM_LIMITED, many)
            add(f"{model} in a third: 1 request, over llama.cpp", _AIM_LIMITED_ALONE,
                limited_ratio(entries, alone=True))  # fmt: skip
    return found


def limited(document: dict[str, Any]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Entries by model and limit."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for entry in document["limited"]:
        found.setdefault((entry["model"], entry["limit_bytes"]), []).append(entry)
    return found


def aims_table(found: Sequence[dict[str, Any]]) -> str:
    words = {True: "met", False: "missed", None: "not measured"}
    rows = [
        [each["aim"], f"{each['wanted']:.2f} x", _ratio(each["ratio"]), words[each["is_met"]]]
        for each in found
    ]
    return table(("aim", "wanted", "measured", ""), rows)


def show(document: dict[str, Any]) -> str:
    """All tables."""
    parts = [case_table(case, cells) for case, cells in cases(document).items()]
    parts += [
        limited_table(
            model, entries, checkpoint_bytes=document["models"][model]["checkpoint_bytes"]
        )
        for (model, _), entries in limited(document).items()
    ]
    parts += [f"skipped: {name}: {why}" for name, why in document["skipped"].items()]
    found = aims(document)
    return "\n\n".join(parts + ([aims_table(found)] if found else []))
