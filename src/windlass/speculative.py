"""What a user may say about drafts: vLLM's `speculative_config`, as far as there are drafters."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches

from windlass.errors import UsageError

METHODS = ("ngram", "mtp")
MOST_DRAFTED = 16  # tokens of a draft
_USUALLY_DRAFTED = {"ngram": 4, "mtp": 1}
_LONGEST_NGRAM = 16
_ORDERS = (1, 3)  # tokens that must be alike, where nothing is said


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeConfig:
    """`ngram`: what followed the last 3, 2 or 1 tokens (`prompt_lookup_max` to `prompt_lookup_min`)
    where they were last seen in prompt or answer is proposed again, `num_speculative_tokens` of
    it at most. As in vLLM, one of the two bounds alone is both. `mtp`: the token after the next is
    guessed by the checkpoint's layer for multi-token prediction."""

    method: str
    num_speculative_tokens: int = 0  # 0: not said
    prompt_lookup_max: int = 0  # 0: not said
    prompt_lookup_min: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise _wrong("method", self.method, ", ".join(METHODS))
        if self.method == "mtp" and (self.prompt_lookup_max or self.prompt_lookup_min):
            raise UsageError(
                "speculative_config: prompt_lookup_max, prompt_lookup_min: allowed with method"
                " ngram alone"
            )
        drafted = self.num_speculative_tokens or _USUALLY_DRAFTED[self.method]
        object.__setattr__(self, "num_speculative_tokens", drafted)
        least = self.prompt_lookup_min or self.prompt_lookup_max or _ORDERS[0]
        most = self.prompt_lookup_max or self.prompt_lookup_min or _ORDERS[1]
        object.__setattr__(self, "prompt_lookup_min", least)
        object.__setattr__(self, "prompt_lookup_max", most)
        if self.method == "mtp" and drafted != 1:
            raise _wrong("num_speculative_tokens", drafted, "1 with method mtp")
        _check("num_speculative_tokens", drafted, 1, MOST_DRAFTED)
        _check("prompt_lookup_max", most, 1, _LONGEST_NGRAM)
        _check("prompt_lookup_min", least, 1, most)

    @classmethod
    def read(cls, given: object) -> "SpeculativeConfig":
        """Of JSON text or an object. Raises UsageError."""
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except ValueError as error:
                raise UsageError(f"speculative_config: not readable as JSON: {error}") from error
        if not isinstance(given, Mapping):
            raise UsageError(
                f"speculative_config: got {given!r:.80}, allowed an object such as"
                ' {"method": "ngram", "num_speculative_tokens": 4}'
            )
        known = [one.name for one in fields(cls)]
        for name in given:
            if name not in known:
                near = get_close_matches(str(name), known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"allowed {', '.join(known)}"
                raise UsageError(f"speculative_config: unknown key: {name} ({hint})")
        if "method" not in given:
            raise UsageError(f"speculative_config: method is missing: allowed {', '.join(METHODS)}")
        for name, most in (
            ("num_speculative_tokens", MOST_DRAFTED),
            ("prompt_lookup_max", _LONGEST_NGRAM), ("prompt_lookup_min", _LONGEST_NGRAM),
        ):  # fmt: skip
            if name in given:
                _check(name, given[name], 1, most)
        return cls(**given)

    def line(self) -> str:
        """For people."""
        if self.method == "mtp":
            return (
                "drafts: mtp, one token by the layer for multi-token prediction, while they pay;"
                " expected times count that layer in every pass, and no guess"
            )
        alike = f"{self.prompt_lookup_min} to {self.prompt_lookup_max}"
        return (
            f"drafts: {self.method}, up to {self.num_speculative_tokens} tokens where the last"
            f" {alike} were seen before, while they pay; expected times are those without"
        )


def _check(name: str, value: object, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise _wrong(name, value, f"an integer from {least} to {most}")


def _wrong(name: str, value: object, allowed: str) -> UsageError:
    return UsageError(f"speculative_config: {name}: got {value!r}, allowed {allowed}")
