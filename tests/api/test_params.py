"""SamplingParams: vLLM's fields, checked once."""

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from windlass.errors import UsageError
from windlass.params import RequestOutputKind, SamplingParams


def test_defaults_are_vllms() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k) == (1, 1.0, 1.0, 0)
    assert (params.max_tokens, params.min_tokens, params.seed) == (16, 0, None)
    assert params.output_kind is RequestOutputKind.CUMULATIVE
    assert not params.is_greedy and SamplingParams(temperature=0).is_greedy


def test_lists_and_keys_are_normalised_and_survive_replace() -> None:
    params = SamplingParams(
        stop="END",
        stop_token_ids=[7, 8],
        logit_bias={"5": 100, 6: -1},  # type: ignore[dict-item]  # keys of JSON, top_k=-1
    )
    for same in (params, dataclasses.replace(params, n=2)):
        assert same.stop == ("END",)
        assert same.stop_token_ids == (7, 8)
        assert same.logit_bias == {5: 100.0, 6: -1.0}
        assert same.top_k == 0
    assert SamplingParams(stop=None, stop_token_ids=None).stop == ()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0), ("n", True), ("n", 10**9), ("temperature", -0.1), ("temperature", float("nan")),
        ("temperature", float("inf")), ("temperature", 10**400), ("temperature", "hot"),
        ("top_p", 0), ("top_p", 1.01), ("top_k", -2), ("top_k", 1.5), ("min_p", -0.1),
        ("min_p", 2), ("presence_penalty", 2.5), ("frequency_penalty", -2.5),
        ("repetition_penalty", 0), ("seed", "x"), ("max_tokens", 0), ("min_tokens", -1),
        ("stop", [""]), ("stop", 5), ("stop", ["a", 5]), ("stop_token_ids", ["a"]),
        ("stop_token_ids", [-1]), ("stop_token_ids", 5), ("ignore_eos", 1), ("logprobs", -2),
        ("logit_bias", {"a": 1}), ("logit_bias", {"-1": 1}), ("logit_bias", {"1": "b"}),
        ("logit_bias", [1]), ("logit_bias", {"1": 100.5}), ("logit_bias", {"1": float("nan")}),
        ("allowed_token_ids", []),
        ("prompt_logprobs", 21), ("prompt_logprobs", -1), ("prompt_logprobs", False),
        ("prompt_logprob_ranks", 1), ("allowed_token_ids", [-5]),
        ("output_kind", "delta"), ("detokenize", None),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_what_is_allowed(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=rf"^{field}: got .*allowed") as caught:
        SamplingParams(**{field: value})
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "given",
    [
        {"bad_words": ["x"]},
        {"thinking_token_budget": 5}, {"flat_logprobs": True}, {"extra_args": {"a": 1}},
        {"repetition_detection": object()}, {"stream_interval": 2}, {"logprob_token_ids": [1]},
        {"skip_reading_prefix_cache": True},
        {"prompt_logprob_token_ids": [1]},
    ],
)  # fmt: skip
def test_what_we_lack_is_refused_unless_at_its_default(given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(UsageError, match=f"^{name}: .*not supported"):
        SamplingParams(**given)
    default: Any = {field.name: field.default for field in dataclasses.fields(SamplingParams)}[name]
    assert getattr(SamplingParams(**{name: default}), name) == default


def test_fields_that_contradict_each_other() -> None:
    with pytest.raises(UsageError, match="min_tokens: got 20, allowed at most max_tokens=16"):
        SamplingParams(min_tokens=20)
    assert SamplingParams(min_tokens=20, max_tokens=None).min_tokens == 20
    with pytest.raises(UsageError, match="prompt_logprob_start: got 3.*prompt_logprobs"):
        SamplingParams(prompt_logprob_start=3)
    with pytest.raises(UsageError, match="stop: .*detokenize"):
        SamplingParams(stop="a", detokenize=False)


def test_generation_config_gives_defaults_under_what_is_given() -> None:
    config = {"temperature": 0.6, "top_k": 20, "max_new_tokens": 99, "do_sample": False,
              "eos_token_id": [1, 2], "top_p": None}  # fmt: skip
    params = SamplingParams.from_generation_config(config, temperature=0.0)
    assert (params.temperature, params.top_k, params.top_p, params.max_tokens) == (0.0, 20, 1.0, 99)


def test_params_import_no_torch() -> None:
    code = (
        "import sys, windlass.params, windlass.engine.outputs;"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
