"""Are the files of all engines one model? Compares what they say after one prompt, and their greedy
tokens, with transformers in the widest type that fits."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from machine import table

from peers import launch, sweep
from peers.models import Model

_SIZE = {"sequences": 1, "prompt_tokens": 32, "output_tokens": 16}
_TIMEOUT_S = 600.0
_TOP = 20  # most likely tokens of the reference, whose log-probabilities are compared
# Of bf16 twins: arithmetic in bf16 reaches a few hundredths over 24 layers, another model about 1
_TOLERANCE = 0.2


def reference_dtype(model: Model) -> str:
    spare = launch.memory_budget() - 2 * model.checkpoint_bytes
    return "float32" if spare > 2_000_000_000 else "bfloat16"


def ask(model: Model, engine: str, form: str, threads: int) -> dict[str, Any]:
    """An engine's log-probabilities (ids and values) and tokens."""
    settings = {"dtype": form} if engine == "transformers" else {}
    size = sweep.Size(**_SIZE, threads=threads)
    job = sweep.make_job(
        model, engine, form, settings=settings, size=size, most=sweep.Most(_TIMEOUT_S, _TIMEOUT_S)
    )
    if job is None:
        return sweep.no_room(model, engine, form, settings).to_json()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "logits.npy"
        outcome = launch.run(engine, replace(job, logits=str(path)), _TIMEOUT_S)
        if outcome.result is None:
            return outcome.to_json()
        array = np.load(path).astype(np.float64)
    if array.ndim == 1:  # logits of all tokens
        array = array - array.max()
        array -= np.log(np.exp(array).sum())
        ids = np.arange(len(array))
    else:
        ids, array = array[0].astype(int), array[1]
    kept = np.argsort(-array)[: 10 * _TOP]
    return outcome.to_json() | {
        "form": form, "ids": ids[kept].tolist(), "logprobs": array[kept].tolist(),
    }  # fmt: skip


def compare(reference: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """The largest difference over tokens that both rank high, and equal leading tokens."""
    known = dict(zip(reference["ids"], reference["logprobs"], strict=True))
    pairs = zip(answer["ids"][:_TOP], answer["logprobs"][:_TOP], strict=True)
    differences = [abs(known[token] - value) for token, value in pairs if token in known]
    wanted, got = reference["result"]["tokens"], answer["result"]["tokens"]
    pairs_of_tokens = enumerate(zip(wanted, got, strict=True))
    equal = next((i for i, (a, b) in pairs_of_tokens if a != b), len(got))
    return {
        "largest_difference": max(differences, default=float("inf")),
        "mean_difference": float(np.mean(differences)) if differences else float("inf"),
        "compared": len(differences),
        "equal_tokens": equal,
        "tokens": len(got),
    }


def without_logprobs(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name not in ("ids", "logprobs")}


def is_same_model(engine: str, form: str, difference: dict[str, Any]) -> bool:
    """Twins of 8 and 4 bits are other numbers: they are only reported."""
    return form not in ("bf16", "bfloat16") or difference["mean_difference"] < _TOLERANCE


def show(model: Model, reference: str, entries: list[dict[str, Any]]) -> str:
    cells = []
    for entry in entries:
        difference = entry.get("difference")
        if difference is None:
            cells.append([f"{entry['engine']} {entry['form']}", entry["status"], "", ""])
            continue
        cells.append([
            f"{entry['engine']} {entry['form']}",
            f"{difference['mean_difference']:.4f}", f"{difference['largest_difference']:.4f}",
            f"{difference['equal_tokens']} of {difference['tokens']}",
        ])  # fmt: skip
    heads = (f"{model.name} against transformers {reference}", "log-probability, mean error",
             "largest", "equal tokens")  # fmt: skip
    return table(heads, cells)
