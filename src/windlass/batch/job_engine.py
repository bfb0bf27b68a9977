"""What a job asks of the engine that runs it."""

from collections.abc import Mapping
from typing import Any, Protocol

from windlass.engine.expectation import Check
from windlass.engine.service import SteppedEngine
from windlass.params import SamplingParams
from windlass.phases import PhaseStats
from windlass.protocol.answers import ParserTokenizer, choose_parsers
from windlass.protocol.openai import ChatTokenizer, ServedModel


class PlanLike(Protocol):
    """A plan as a job sees it. `above`: None without a device beside the host."""

    @property
    def above(self) -> object | None: ...
    def to_json(self) -> dict[str, Any]: ...
    def lines(self) -> list[str]: ...


class JobTokenizer(ChatTokenizer, ParserTokenizer, Protocol):
    """The tokenizer as a job sees it."""


class JobModel(Protocol):
    """What a job asks of its engine beside passes."""

    @property
    def plan(self) -> PlanLike: ...
    @property
    def tokenizer(self) -> JobTokenizer: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def limited_by(self) -> str: ...
    @property
    def default_params(self) -> SamplingParams: ...
    @property
    def fingerprint(self) -> Mapping[str, object]: ...
    @property
    def capacity(self) -> int: ...


class JobEngine(SteppedEngine, JobModel, Protocol):
    """The engine of a job that has it for itself."""

    def compare(self, phases: Mapping[str, PhaseStats]) -> Check | None: ...


def served_model(
    engine: JobModel, names: tuple[str, ...], *, now: int, parsers: tuple[str, str]
) -> ServedModel:
    """What rows may ask of it. `now`: seconds since 1970, for chat templates. `parsers`: of tool
    calls and of reasoning, by name."""
    return ServedModel(
        names,
        engine.tokenizer,
        engine.max_model_len,
        engine.default_params,
        now=now,
        limited_by=engine.limited_by,
        parsers=choose_parsers(engine.tokenizer, *parsers),
    )
