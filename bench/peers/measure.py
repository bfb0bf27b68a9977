"""The comparison with everything in memory: case by case, engines in turn, round after round."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from peers import check, launch, models, sweep
from peers.document import Document
from peers.models import Model

_WARM_SIZES = (1, 64)  # settings are found for one sequence and for many


@dataclass(frozen=True, slots=True)
class Contender:
    """An engine with weights in a format; transformers' is its best dtype."""

    engine: str
    form: str

    def __str__(self) -> str:
        return f"{self.engine} {self.form}"


CONTENDERS = (
    Contender("windlass", "bf16"),
    Contender("windlass", "bf16" + models.ROUNDED),
    Contender("llama.cpp", "bf16"),
    Contender("transformers", "best"),
    Contender("windlass", "int8"),
    Contender("windlass", "int8" + models.ROUNDED),
    Contender("llama.cpp", "q8_0"),
    Contender("windlass", "int4"),
    Contender("windlass", "int4" + models.ROUNDED),
    Contender("llama.cpp", "q4_0"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the user asked for."""

    contenders: tuple[Contender, ...]
    sequences: tuple[int, ...]
    prompts: tuple[int, ...]
    output_tokens: int
    rounds: int
    threads: int
    timeout_s: float  # of a run
    phase_s: float  # after which a phase is scaled up, for engines that can
    case_s: float  # of all runs of a case: no further round is begun after it


class Comparison:
    """One model at a time; entries go to the document."""

    def __init__(self, document: Document, hint: Wish) -> None:
        self._document = document
        self.hint = hint

    def available(self, model: Model) -> list[Contender]:
        """Contenders whose files are there, made now if need be; others are noted."""
        found = []
        for contender in self.hint.contenders:
            why = models.prepare(model, contender.engine, contender.form)
            skipped = self._document.data["skipped"]
            skipped.pop(f"{model.name} {contender}", None)
            if why is None:
                found.append(contender)
                continue
            print(f"{model.name}, {contender}: skipped: {why}", flush=True)
            skipped[f"{model.name} {contender}"] = why
        self._document.data["models"][model.name] = model.shape()
        return found

    def check(self, model: Model, contenders: Sequence[Contender]) -> None:
        """Stops where a twin in bf16 is not the same model."""
        wide = check.reference_dtype(model)
        asked = [("transformers", wide)]
        asked += [("transformers", "bfloat16")] if wide != "bfloat16" else []
        asked += [
            (c.engine, c.form) for c in contenders
            if c.engine != "transformers" and not c.form.endswith(models.ROUNDED)
        ]  # fmt: skip
        if all(c.engine == "windlass" for c in contenders):
            return
        entries: list[dict[str, Any]] = []
        for engine, form in asked:
            key = f"{model.name} {engine} {form}"

            def make(engine: str = engine, form: str = form) -> dict[str, Any]:
                answer = check.ask(model, engine, form, self.hint.threads) | {"form": form}
                reference = entries[0] if entries else answer
                if answer["result"] is not None and reference["result"] is not None:
                    answer["difference"] = check.compare(reference, answer)
                return answer if reference is answer else check.without_logprobs(answer)

            entries.append(self._document.record("checks", key, engine, make))
        print("\n" + check.show(model, wide, entries), flush=True)
        for entry in entries:
            difference = entry.get("difference")
            if difference and not check.is_same_model(entry["engine"], entry["form"], difference):
                raise SystemExit(f"{entry['key']}: not the same model: {difference}")

    def settings(self, model: Model, contender: Contender, sequences: int) -> dict[str, Any] | None:
        """The engine's best for so many sequences; None where nothing ran."""
        if contender.engine == "windlass":
            rounded = contender.form.endswith(models.ROUNDED)
            return {"host_memory": launch.memory_budget()} | (
                {"dtype": "bfloat16"} if rounded else {}
            )
        many = max(s for s in (1, min(_WARM_SIZES[1], max(self.hint.sequences))) if s <= sequences)
        size = sweep.Size(
            sequences=many, prompt_tokens=min(self.hint.prompts), threads=self.hint.threads,
            output_tokens=self.hint.output_tokens,
        )  # fmt: skip
        key = f"{model.name} {contender} {many}"
        found = self._document.record(
            "sweeps", key, contender.engine,
            lambda: sweep.best_settings(model, contender.engine, contender.form, size),
        )  # fmt: skip
        return None if found["seconds"] is None else found["settings"]

    def run_case(
        self, model: Model, contenders: Sequence[Contender], prompt: int, sequences: int
    ) -> None:
        """All rounds of a case. The order turns around from round to round."""
        spent = 0.0
        for round_ in range(self.hint.rounds):
            if round_ and spent > self.hint.case_s:
                return
            for contender in contenders if round_ % 2 == 0 else reversed(contenders):
                entry = self._run(model, contender, (prompt, sequences, round_))
                spent += entry["seconds"]

    def _run(self, model: Model, contender: Contender, at: tuple[int, int, int]) -> dict[str, Any]:
        prompt, sequences, round_ = at
        hint, engine = self.hint, contender.engine
        case = {"model": model.name, "form": contender.form, "prompt_tokens": prompt,
                "output_tokens": hint.output_tokens, "sequences": sequences,
                "round": round_}  # fmt: skip
        name = f"{model.name} {contender}, {prompt} + {hint.output_tokens} tokens, {sequences} seqs"
        first = self._document.find("runs", f"{name}, round 0")
        if first is not None and first["status"] != "ok":  # it would end the same way again
            return first
        settings = self.settings(model, contender, sequences)
        size = sweep.Size(sequences=sequences, prompt_tokens=prompt,
                          output_tokens=hint.output_tokens, threads=hint.threads)  # fmt: skip

        def make() -> dict[str, Any]:
            if settings is None:
                return case | launch.Outcome(status="failed", message="no settings ran").to_json()
            job = sweep.make_job(
                model, engine, contender.form, settings=settings, size=size,
                most=sweep.Most(hint.phase_s, hint.phase_s, hint.output_tokens),
            )  # fmt: skip
            if job is None:
                return case | sweep.no_room(model, engine, contender.form, settings).to_json()
            outcome = launch.run(engine, job, hint.timeout_s)
            print(f"  {_said(outcome)}", flush=True)
            return case | {"settings": settings, "at_once": job.at_once} | outcome.to_json()

        return self._document.record("runs", f"{name}, round {round_}", engine, make)


def _said(outcome: launch.Outcome) -> str:
    if outcome.result is None:
        return f"{outcome.status}: {outcome.message}"
    result = outcome.result
    return f"prefill {result['prefill_s']:.1f} s, decode {result['decode_s']:.1f} s"


def cases(hint: Wish) -> Iterator[tuple[int, int]]:
    """Prompt length and sequences, what the aims are about first."""
    order = sorted(hint.sequences, key=lambda count: (count != 64, count != 1, count))
    for prompt in hint.prompts:
        for sequences in order:
            yield prompt, sequences
