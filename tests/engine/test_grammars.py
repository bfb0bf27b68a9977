"""Constrained answers of tiny random models: always what was asked for, the same bits whatever the
batch, guesses and memory are, and a grammar that fails ends its own row."""

import itertools
import json
import random
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel, TypeAdapter
from tokenizers import Tokenizer, decoders, models

from drafters import Eager, Oracle
from engines import engine_for, make_model, request, run_all
from families import VOCAB
from tokenizers_for_tests import byte_level, metaspace_unigram, sentencepiece_bpe
from windlass.engine.drafting import Drafting
from windlass.engine.engine import Engine
from windlass.engine.grammars import Constraint, Grammars
from windlass.engine.outputs import GRAMMAR_FAILED, RequestOutput
from windlass.engine.tokenizer import load
from windlass.errors import RequestError, UsageError
from windlass.speculative import SpeculativeConfig
from windlass.structured import MAX_BYTES, MAX_DEPTH, StructuredOutputs

# One character per token, printable ASCII but for those that are left out, and what ends a text.
LEFT_OUT = "~`^|@&$;?=!<>%#"
CHARS = [chr(code) for code in range(32, 127) if chr(code) not in LEFT_OUT]
END = len(CHARS)
TEXT = {"type": "string", "maxLength": 6}
NUMBER = {"type": "integer", "minimum": -50, "maximum": 120}


class Cat(BaseModel):
    kind: str
    lives: int


SCHEMAS: list[tuple[dict[str, Any], Any]] = [
    (NUMBER, int),
    ({"type": "boolean"}, bool),
    ({"type": "null"}, None),
    ({"enum": ["red", "green", 7, None]}, str | int | None),
    ({"const": {"a": [1]}}, dict[str, list[int]]),
    ({"type": "array", "items": NUMBER, "minItems": 2, "maxItems": 4}, list[int]),
    ({"type": "object", "properties": {"kind": TEXT, "lives": NUMBER},
      "required": ["kind", "lives"], "additionalProperties": False}, Cat),
    ({"type": "object", "properties": {"cat": {"$ref": "#/$defs/Cat"}}, "required": ["cat"],
      "additionalProperties": False,
      "$defs": {"Cat": {"type": "object", "properties": {"kind": TEXT, "lives": NUMBER},
                        "required": ["kind", "lives"], "additionalProperties": False}}},
     dict[str, Cat]),
    ({"oneOf": [{"type": "object", "properties": {"a": NUMBER}, "required": ["a"],
                 "additionalProperties": False},
                {"type": "object", "properties": {"b": TEXT}, "required": ["b"],
                 "additionalProperties": False}]}, dict[str, int] | dict[str, str]),
    ({"anyOf": [NUMBER, {"type": "null"}]}, int | None),
    ({"type": "string", "pattern": "^[a-f]{2,5}$"}, str),
    ({"type": "array", "prefixItems": [NUMBER, TEXT], "minItems": 2, "items": False},
     tuple[int, str]),
]  # fmt: skip


def characters(folder: Path) -> None:
    words = {char: place for place, char in enumerate(CHARS)} | {"<end>": END}
    words |= {f"<unused{place}>": place for place in range(END + 1, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([name for name in words if name.startswith("<")])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": END}))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_model("qwen3_moe", path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    characters(path)
    return path


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    with engine_for(model) as found:
        yield found


def answer(output: RequestOutput) -> tuple[str, str | None]:
    assert output.error is None, output.error
    return output.outputs[0].text, output.outputs[0].finish_reason


def wants(name: str, given: dict[str, Any], **params: Any) -> Any:
    settings = {"temperature": 1.0, "max_tokens": 120, **params}
    return request(name, [5, 9, len(name)], structured_outputs=given, **settings)


def test_json_is_always_what_the_schema_says(engine: Engine) -> None:
    requests = [
        wants(f"{place}.{seed}", {"json": schema}, seed=seed)
        for place, (schema, _) in enumerate(SCHEMAS)
        for seed in range(4)
    ]
    results = run_all(engine, requests)
    for name, output in results.items():
        text, reason = answer(output)
        place = int(name.partition(".")[0])
        TypeAdapter(SCHEMAS[place][1]).validate_json(text, strict=place != 11)
        assert reason == "stop"
        number = json.loads(text)
        assert place or -50 <= number <= 120
    assert len({output.outputs[0].text for output in results.values()}) > 30  # they are drawn
    assert all(re.fullmatch('"[a-f]{2,5}"', answer(results[f"10.{i}"])[0]) for i in range(4))


@pytest.mark.parametrize("sampled", [False, True])
def test_regex_choice_and_grammar_hold(engine: Engine, sampled: bool) -> None:
    lark = 'start: "<" ("a" | "b")+ ">"'.replace("<", "(").replace(">", ")")
    gbnf = 'root ::= "x" [0-9] "y"'
    given: dict[str, tuple[dict[str, Any], str]] = {
        "regex": ({"regex": r"[0-9]{3}-[a-c]+x"}, r"[0-9]{3}-[a-c]+x"),
        "choice": ({"choice": ["yes", "no", 'may "be" \\']}, r'yes|no|may "be" \\'),
        "lark": ({"grammar": lark}, r"\([ab]+\)"),
        "gbnf": ({"grammar": gbnf}, "x[0-9]y"),
        "object": ({"json_object": True}, r"\{.*"),
    }
    params = {"temperature": 1.0 if sampled else 0.0, "max_tokens": 60}
    results = run_all(engine, [wants(n, what, **params) for n, (what, _) in given.items()])
    for name, (_, pattern) in given.items():
        text, reason = answer(results[name])
        if reason == "stop":
            assert re.fullmatch(pattern, text), (name, text)
        else:  # a loop may go on for ever
            assert name in ("regex", "lark", "object") and len(text) == 60
    assert answer(results["choice"])[1] == answer(results["gbnf"])[1] == "stop"


def test_an_end_counts_whatever_min_tokens_and_ignore_eos_say(engine: Engine) -> None:
    for params in ({"ignore_eos": True}, {"min_tokens": 9}, {"ignore_eos": False}):
        output = run_all(engine, [wants("end", {"choice": ["abc"]}, **params)])["end"]
        assert answer(output) == ("abc", "stop")
    # where more may follow, the model decides; a bias makes it end
    ends = wants("bias", {"regex": "a+"}, logit_bias={END: 100}, ignore_eos=False)
    output = run_all(engine, [ends])["bias"]
    assert answer(output) == ("a", "stop") and output.outputs[0].token_ids[-1] == END


def _eager(oracles: Iterator[partial[Oracle]], config: SpeculativeConfig) -> Eager:
    return Eager(config.num_speculative_tokens, lambda: next(oracles)())


def test_bits_do_not_depend_on_company_guesses_or_memory(
    model: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [
        request(f"{place}.{sampled}", [5, 9, place, int(sampled)], max_tokens=80, logprobs=2,
                structured_outputs={"json": schema}, temperature=sampled)
        for place, (schema, _) in enumerate(SCHEMAS)
        for sampled in (0.0, 1.0)
    ]  # fmt: skip
    alone: dict[str, RequestOutput] = {}
    for one in requests:
        alone |= run_all(engine, [one])
    together = run_all(engine, [*requests, request("free", [1, 2, 3], max_tokens=30)])
    known = {one.prompt_token_ids: alone[one.request_id].outputs[0].token_ids for one in requests}
    for wrong in (0.0, 0.4):
        oracles = (partial(Oracle, known, wrong=wrong, seed=seed) for seed in itertools.count())
        monkeypatch.setattr(Drafting, "of", partial(_eager, oracles))
        with engine_for(model, speculative_config=SpeculativeConfig(method="ngram")) as other:
            guessed = run_all(other, requests)
            drafts = other.stats().drafts
        assert drafts is not None and drafts.accepted > 0
        assert (drafts.accepted > 0.8 * drafts.proposed) == (wrong == 0.0)
        assert {name: one.outputs for name, one in guessed.items()} == {
            name: one.outputs for name, one in alone.items()
        }
    assert all(together[name].outputs == output.outputs for name, output in alone.items())


def test_what_gives_way_goes_on_where_it_was(
    model: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [
        request(f"{i}", [i] * 20, max_tokens=80, temperature=1.0,
                structured_outputs={"regex": "([a-c]{3}[0-9]){18,}"})
        for i in range(4)
    ]  # fmt: skip
    expected = {name: one.outputs for name, one in run_all(engine, requests).items()}
    known = {one.prompt_token_ids: expected[one.request_id][0].token_ids for one in requests}
    oracles = itertools.repeat(partial(Oracle, known, wrong=0.3))
    monkeypatch.setattr(Drafting, "of", partial(_eager, oracles))
    for config in (None, SpeculativeConfig(method="ngram")):
        with engine_for(model, speculative_config=config) as other:
            kv = other._admission._kv.device
            held = kv.take_pages(kv.num_free_pages - 6)  # as if another had them
            found = run_all(other, requests, check=False)
            assert other.stats().num_preemptions > 0
            kv.give_pages(held)
        assert {name: one.outputs for name, one in found.items()} == expected


def test_a_grammar_that_fails_ends_its_row_alone(engine: Engine) -> None:
    """More keys that may follow than llguidance looks at: it says so behind the first brace."""
    schema = {"type": "object", "properties": {f"k{i}": {"type": "null"} for i in range(600)}}
    good = [wants(f"good{i}", {"regex": "[a-z]{20}"}) for i in range(2)]
    engine.validate(wants("bad", {"json": schema}))
    alone = {name: one.outputs for name, one in run_all(engine, good).items()}
    results = run_all(engine, [good[0], wants("bad", {"json": schema}), good[1]])
    assert results["bad"].error_code == GRAMMAR_FAILED
    assert results["bad"].error is not None and "2000" in results["bad"].error
    assert results["bad"].outputs[0].finish_reason == "error"
    assert all(results[name].outputs == outputs for name, outputs in alone.items())


def test_grammars_that_explode_are_cut_short(engine: Engine) -> None:
    """In part of a second, and never the engine's end."""
    one = wants("big", {"regex": "((a{100}){100}){40}"}, max_tokens=4)
    output = run_all(engine, [one, wants("good", {"regex": "b{9}"})])
    assert output["big"].error_code in (GRAMMAR_FAILED, None)
    assert answer(output["good"]) == ("b" * 9, "stop")


def test_a_text_may_be_free_up_to_a_mark(engine: Engine) -> None:
    given = StructuredOutputs(regex="[xyz]{4}", after="ab")
    bias = {CHARS.index(char): 30 for char in "ab"}
    output = run_all(
        engine, [request("free", [3, 4], structured_outputs=given, max_tokens=90, temperature=1.0,
                         logit_bias=bias, ignore_eos=False)]
    )["free"]  # fmt: skip
    text, reason = answer(output)
    assert re.fullmatch("[ab]*?ab[xyz]{4}", text) and reason == "stop"


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"json": {"type": "objct"}}, "Invalid type"),
        ({"json": {"type": "object", "uniqueItems": True}}, "uniqueItems"),
        ({"regex": "a("}, "unclosed group"),
        ({"regex": "(?=a)"}, "look-around"),
        ({"grammar": "start: nothing"}, "unknown name"),
        ({"json": {"$ref": "#/$defs/x"}}, "does not exist"),
        ({"json": {"not": {}}}, "not"),
    ],
)
def test_what_cannot_be_compiled_is_refused_by_name(
    engine: Engine, given: dict[str, Any], text: str
) -> None:
    with pytest.raises(RequestError, match="^structured_outputs: ") as caught:
        engine.validate(wants("bad", given))
    assert text in str(caught.value) and caught.value.param == "structured_outputs"
    assert len(str(caught.value)) < 400


def test_schemas_are_bounded_before_they_are_compiled() -> None:
    deep: Any = {}
    for _ in range(MAX_DEPTH + 1):
        deep = {"items": deep}
    for given, text in (
        ({"json": deep}, "nested too deeply"),
        ({"json": {"enum": ["x" * MAX_BYTES]}}, "bytes, allowed"),
        ({"json": "[" * 100_000}, "allowed 65536 bytes"),
        ({"json": "[" * 60_000}, "not readable"),
        ({"json": 3}, "a JSON schema"), ({"regex": ""}, "not empty"),
        ({"choice": []}, "not empty|none empty"), ({"choice": [""]}, "none empty"),
        ({"choice": "yes"}, "a list"), ({"json_object": 1}, "true or false"),
        ({}, "exactly one"), ({"regex": "a", "choice": ["a"]}, "regex and choice"),
        ({"structural_tag": "{}"}, "structural_tag: not supported"),
        ({"regexp": "a"}, "did you mean regex"), ("x", "one of"),
        ({"regex": "a", "whitespace_pattern": " "}, "whitespace_pattern"),
        ({"json": {"a": {1, 2}}}, "JSON values"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match="^structured_outputs") as caught:
            StructuredOutputs.read(given)
        assert re.search(text, str(caught.value)), str(caught.value)
    kept = StructuredOutputs.read({"json": '{"type": "null"}', "disable_any_whitespace": True})
    assert (kept.kind, kept.text) == ("json", '{"type":"null"}')


def test_a_missing_program_is_named_with_its_extra(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match="pip install llguidance"):
        engine.validate(wants("x", {"regex": "not-seen-before"}))


@pytest.mark.parametrize(
    "make", [byte_level, sentencepiece_bpe, metaspace_unigram], ids=lambda make: make.__name__
)
def test_any_kind_of_tokenizer_writes_what_the_grammar_says(
    make: Callable[[], Tokenizer], tmp_path: Path
) -> None:
    make().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load(tmp_path)
    grammars = Grammars(tokenizer, tokenizer.vocab_size + 7)  # models pad their vocabulary
    chance = random.Random(1)
    schema, texts = SCHEMAS[7][0], ["né à 東京", "no"]
    for wanted in [StructuredOutputs(json=schema), StructuredOutputs(choice=texts)] * 5:
        constraint, data = Constraint(grammars, wanted), b""
        while not constraint.is_complete:
            constraint.prepare(())
            allowed = np.flatnonzero(constraint.allowed())
            token = int(chance.choice(allowed))
            constraint.accept(token)
            data += tokenizer.token_bytes(token)
        if wanted.kind == "choice":
            assert data.decode() in texts
        else:
            TypeAdapter(SCHEMAS[7][1]).validate_json(data, strict=True)
