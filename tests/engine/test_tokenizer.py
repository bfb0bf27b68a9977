"""Tokenizer: the same ids and prompts as transformers, without importing it."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tokenizers_for_tests import ALL, CORPUS, byte_level, sentencepiece_bpe
from windlass.engine.tokenizer import Tokenizer, load
from windlass.errors import CheckpointError, RequestError
from windlass.protocol.continued import continued

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = """{{ bos_token }}{%- for message in messages %}
    {%- if message['role'] not in ['user', 'assistant'] %}
        {{- raise_exception('roles must be user or assistant, got ' + message['role']) }}
    {%- endif %}
    {%- if loop.index0 > 5 %}{% break %}{% endif %}
    {%- if message['role'] == 'user' %}
    [INST] {{ message['content'] | trim }} [/INST]
    {%- else %}
    {% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}
    {%- endif %}
{% endfor %}"""
TOOLS = """{%- set ns = namespace(count=0) %}
{%- if tools is defined and tools %}
{% for tool in tools %}{{ tool | tojson(indent=2) }}
{% set ns.count = ns.count + 1 %}{% endfor %}
{%- endif %}{{ ns.count }} tools, {{ strftime_now('%Y') }}, {{ thinking | default('off') }}
{%- for m in messages %}{{ m | tojson }}{{ m.reasoning_content }}{{ undefined_name }}{% endfor %}
{{- dict(a=1) | tojson }}"""
MESSAGES = [
    {"role": "user", "content": "  <b>Grüße</b> & 你好 'x'  "},
    {"role": "assistant", "content": "Hi 👩‍👩‍👧", "reasoning": "hm"},
    {"role": "user", "content": "Bye"},
]
WEATHER = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "ü": 1}}}
]


def checkpoint(folder: Path, name: str = "byte_level", **files: dict[str, Any] | str) -> Path:
    """A folder with a tokenizer; keywords are further files, `__` for the dot in their names."""
    ALL[name]().save(str(folder / "tokenizer.json"))
    files.setdefault("tokenizer_config__json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    for key, value in files.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (folder / key.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


def config(**fields: Any) -> dict[str, Any]:
    return {"tokenizer_class": "PreTrainedTokenizerFast", **fields}


def reference(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(folder))


CONFIGS = [
    {},
    {"bos_token": "<s>", "eos_token": "</s>"},
    {"bos_token": "<s>", "add_bos_token": True, "add_eos_token": False},
    {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": True},
    {"bos_token": {"content": "<s>", "lstrip": False, "rstrip": False, "normalized": False,
                   "single_word": False, "__type": "AddedToken"}, "add_bos_token": True},
    {"bos_token": "<s>", "add_bos_token": False},
    {"bos_token": None, "add_bos_token": True},
    {"eos_token": "<|new|>", "additional_special_tokens": ["<|other|>", "fox"]},
    {"added_tokens_decoder": {
        "900": {"content": "<|late|>", "lstrip": False, "rstrip": False, "normalized": False,
                "single_word": False, "special": True},
        "901": {"content": "jumps", "lstrip": True, "rstrip": False, "normalized": False,
                "single_word": True, "special": False}}},
    {"eos_token": "jumps", "added_tokens_decoder": {
        "901": {"content": "jumps", "lstrip": False, "rstrip": False, "normalized": False,
                "single_word": False, "special": False}}},
    {"split_special_tokens": True, "eos_token": "</s>"},
]  # fmt: skip


@pytest.mark.parametrize("name", ["sentencepiece_bpe", "metaspace_unigram", "byte_level"])
@pytest.mark.parametrize("fields", CONFIGS)
def test_special_tokens_are_set_as_transformers_sets_them(
    tmp_path: Path, name: str, fields: dict[str, Any]
) -> None:
    folder = checkpoint(tmp_path, name, tokenizer_config__json=config(**fields))
    ours, theirs = load(folder), reference(folder)
    for text in (*CORPUS[:4], "<s>a</s> <|new|> <|other|><|late|> jumps", ""):
        for special in (True, False):
            expected = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, special) == expected, text
        ids = theirs.encode(text)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
                ids, skip_special_tokens=skip
            )
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("template", [CHATML, LLAMA, TOOLS])
@pytest.mark.parametrize("with_tools", [False, True])
@pytest.mark.parametrize("prompt", [False, True])
def test_chat_renders_as_transformers_renders_it(
    tmp_path: Path, template: str, with_tools: bool, prompt: bool
) -> None:
    fields = config(bos_token="<s>", eos_token="</s>", chat_template=template)
    folder = checkpoint(tmp_path, "metaspace_unigram", tokenizer_config__json=fields)
    tools = WEATHER if with_tools else None
    options: dict[str, Any] = {"tools": tools, "add_generation_prompt": prompt}
    variables = {"thinking": "on"}
    ours, theirs = load(folder), reference(folder)
    text = ours.render_chat(MESSAGES, **options, variables=variables)
    options |= variables
    assert text == theirs.apply_chat_template(MESSAGES, tokenize=False, **options)
    ids = theirs.apply_chat_template(MESSAGES, tokenize=True, return_dict=False, **options)
    options = {"tools": tools, "add_generation_prompt": prompt, "variables": variables}
    assert ours.apply_chat_template(MESSAGES, **options) == ids


@pytest.mark.parametrize("template", [CHATML, LLAMA])
@pytest.mark.parametrize("content", ["Once upon", "Once upon  ", "im_end", "a <s> b"])
def test_an_answer_goes_on_where_transformers_lets_it(
    tmp_path: Path, template: str, content: str
) -> None:
    fields = config(bos_token="<s>", eos_token="</s>", chat_template=template)
    folder = checkpoint(tmp_path, "metaspace_unigram", tokenizer_config__json=fields)
    messages = [MESSAGES[0], {"role": "assistant", "content": content}]
    render = partial(load(folder).render_chat, add_generation_prompt=False)
    expected = reference(folder).apply_chat_template(
        messages, tokenize=False, continue_final_message=True
    )
    assert continued(messages, render) == expected


def test_long_texts_have_the_ids_of_short_ones(tmp_path: Path) -> None:
    """They go another way, which holds no other thread up."""
    tokenizer = load(checkpoint(tmp_path))
    text = "The quick brown fox. Grüße 👋\n" * 1000
    for special in (False, True):
        known = tokenizer._backend.encode(text, add_special_tokens=special).ids
        assert tokenizer.encode(text, special) == known
    with pytest.raises(RequestError, match="not valid Unicode"):
        tokenizer.encode(text + "\ud800")


OLDER = {
    "added_tokens__json": {"<|late|>": 901, "jumps": 900, "</s>": 902},
    "special_tokens_map__json": {"eos_token": {"content": "<|late|>", "lstrip": True}},
    "tokenizer_config__json": config(eos_token="</s>", bos_token="<s>"),
}


@pytest.mark.parametrize("name", ["sentencepiece_bpe", "byte_level"])
@pytest.mark.parametrize("left_out", [None, *OLDER])
def test_added_tokens_of_older_checkpoints(tmp_path: Path, name: str, left_out: str | None) -> None:
    files = {file: fields for file, fields in OLDER.items() if file != left_out}
    folder = checkpoint(tmp_path, name, **files)  # type: ignore[arg-type]
    ours, theirs = load(folder), reference(folder)
    for text in ("<s>a</s> <|late|> jumps", "It jumps."):
        assert ours.encode(text) == theirs.encode(text)
        ids = theirs.encode(text)
        for skip in (True, False):
            own = ours.decode(ids, skip_special_tokens=skip)
            assert own == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.vocab_size == len(theirs)
    if left_out != "added_tokens__json":
        (folder / "added_tokens.json").write_text(json.dumps({"fox": 900}))
        assert load(folder).digest != ours.digest


def test_what_decides_about_special_tokens_is_in_the_digest(tmp_path: Path) -> None:
    whole = load(checkpoint(tmp_path, tokenizer_config__json=config()))
    split = load(checkpoint(tmp_path, tokenizer_config__json=config(split_special_tokens=True)))
    assert whole.encode("<|im_end|>") == [2] != split.encode("<|im_end|>")
    assert whole.digest != split.digest


def test_a_long_text_is_refused_without_being_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("windlass.engine.text_limits.LONG_TEXT", 2000)
    monkeypatch.setattr("windlass.engine.tokenizer.LONG_TEXT", 2000)
    tokenizer = load(checkpoint(tmp_path))
    given: list[int] = []
    encode = tokenizer._ids

    def counted(text: str, special: bool) -> list[int]:
        given.append(len(text))
        return encode(text, special)

    monkeypatch.setattr(tokenizer, "_ids", counted)
    for text, at_most, most in (("x" * 10**7, 1000, 0), ("x y z " * 50_000, 20_000, 3 << 14)):
        with pytest.raises(RequestError, match=f"{len(text)} characters and more than") as caught:
            tokenizer.encode(text, at_most=at_most)
        assert caught.value.code == "context_length_exceeded"
        assert sum(given) <= most
    text = "The quick brown fox. " * 5000
    ids = tokenizer.encode(text)
    assert tokenizer.encode(text, at_most=len(ids)) == ids  # it fits
    short = "x y " * 100
    assert tokenizer.encode(short, at_most=5) == encode(short, True)  # told by whoever asked


def test_where_templates_come_from(tmp_path: Path) -> None:
    several = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    folder = checkpoint(tmp_path, tokenizer_config__json=config(chat_template=several))
    tokenizer = load(folder)
    assert tokenizer.render_chat(MESSAGES) == "plain"
    assert tokenizer.render_chat(MESSAGES, WEATHER) == "tools"
    assert tokenizer.render_chat(MESSAGES, chat_template="tool_use") == "tools"
    assert tokenizer.render_chat(MESSAGES, chat_template="{{ messages|length }}") == "3"
    before = tokenizer.digest
    (folder / "chat_template.jinja").write_text("from the file")
    assert load(folder).render_chat(MESSAGES, WEATHER) == "from the file"
    assert load(folder).digest != before == tokenizer.digest
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("with tools")
    assert load(folder).render_chat(MESSAGES, WEATHER) == "with tools"
    assert load(folder).render_chat(MESSAGES) == "from the file"


def test_templates_by_name_in_one_object(tmp_path: Path) -> None:
    named = {"default": "plain", "tool_use": "tools"}
    tokenizer = load(checkpoint(tmp_path, tokenizer_config__json=config(chat_template=named)))
    assert tokenizer.render_chat(MESSAGES) == "plain"
    assert tokenizer.render_chat(MESSAGES, WEATHER) == "tools"
    for wrong in (3, ["plain"], {"default": 3}, [{"name": "default"}]):
        with pytest.raises(CheckpointError, match="chat_template: got .*templates by name"):
            load(checkpoint(tmp_path, tokenizer_config__json=config(chat_template=wrong)))


def test_variables_of_templates_may_have_any_name(tmp_path: Path) -> None:
    plain = load(checkpoint(tmp_path))
    names = ("self", "source", "extra", "variables", "text", "not a name")
    variables = dict.fromkeys(names, 1)
    template = "{{ source }}{{ extra }}{{ text }}"
    assert plain.render_chat(MESSAGES, chat_template=template, variables=variables) == "111"
    for name in ("raise_exception", "strftime_now"):
        with pytest.raises(RequestError, match="chat template: .*not callable"):
            plain.render_chat(
                MESSAGES, chat_template="{{ " + name + "('x') }}", variables={name: 1}
            )


def test_the_time_of_templates_can_be_fixed(tmp_path: Path) -> None:
    template = "{% macro day() %}{{ strftime_now('%d %b %Y %H:%M') }}{% endmacro %}{{ day() }}"
    tokenizer = load(checkpoint(tmp_path, chat_template__jinja=template))
    assert tokenizer.render_chat(MESSAGES, now=1790000000) == "21 Sep 2026 14:13"
    ids = tokenizer.apply_chat_template(MESSAGES, now=1790000000)
    assert tokenizer.decode(ids) == "21 Sep 2026 14:13"
    assert tokenizer.render_chat(MESSAGES) != "21 Sep 2026 14:13"


def test_chat_errors_are_the_requests(tmp_path: Path) -> None:
    plain = load(checkpoint(tmp_path))
    with pytest.raises(RequestError, match="the checkpoint has none"):
        plain.render_chat(MESSAGES)
    for template, messages, message in (
        (LLAMA, [{"role": "tool", "content": ""}], "got tool"),
        ("{{ messages[0].content + 1 }}", MESSAGES, "chat template: "),
        ("{{ 1 / 0 }}", MESSAGES, "chat template: division"),
        ("{% if %}", MESSAGES, "chat template: "),
        ("{{ messages.clear() }}", MESSAGES, "chat template: .*unsafe"),
        ("{{ ''.__class__.__mro__ }}", MESSAGES, "chat template: .*unsafe"),
        ("x", [{"content": "no role"}], "messages: got .*role"),
        ("x", ["text"], "messages: got 'text'"),
        ("x", [{"role": "user", "content": object()}], "messages: .*JSON"),
    ):
        with pytest.raises(RequestError, match=message) as caught:
            plain.render_chat(messages, chat_template=template)  # type: ignore[arg-type]
        assert caught.value.param == "messages"


def test_end_of_sequence_ids_of_all_files(tmp_path: Path) -> None:
    folder = checkpoint(
        tmp_path,
        tokenizer_config__json=config(eos_token="<|im_end|>"),
        generation_config__json={"eos_token_id": [2, 7, None]},
        config__json={"eos_token_id": [9, None], "text_config": {"eos_token_id": 11}},
    )
    tokenizer = load(folder)
    assert tokenizer.eos_token_ids == (2, 7, 9, 11)
    assert tokenizer.special_ids == {0, 1, 2}
    (folder / "generation_config.json").unlink()
    (folder / "config.json").unlink()
    assert load(folder).eos_token_ids == (2,)
    assert load(folder).digest != tokenizer.digest


def test_another_tokenizer_keeps_the_end_of_sequence_ids_of_the_model(tmp_path: Path) -> None:
    model, other = tmp_path / "model", tmp_path / "other"
    model.mkdir()
    other.mkdir()
    checkpoint(model, config__json={"eos_token_id": 9}, generation_config__json={})
    checkpoint(other, tokenizer_config__json=config(eos_token="<|im_end|>"))
    assert load(other).eos_token_ids == (2,)
    both = load(other, model_folder=model)
    assert both.eos_token_ids == (2, 9)
    assert both.digest != load(other).digest
    assert load(model, model_folder=model).eos_token_ids == load(model).eos_token_ids == (9,)


def test_special_tokens_map_of_older_checkpoints(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, special_tokens_map__json={"eos_token": {"content": "<|im_end|>"}})
    assert load(folder).eos_token_ids == (2,)


def test_bytes_of_tokens() -> None:
    for name, text in (("byte_level", "龍 ok"), ("sentencepiece_bpe", "龍 ok")):
        tokenizer = Tokenizer(ALL[name](), config={}, templates={})
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(map(tokenizer.token_bytes, ids)).strip() == text.encode()
        assert any(tokenizer.token_bytes(i) == b"\xe9" for i in ids)  # a part of 龍
    assert tokenizer.token_bytes(10**6) == b""
    byte = byte_level()
    bytes_of = Tokenizer(byte, config={}, templates={}).token_bytes
    assert {bytes_of(i) for i in range(3, 259)} == {bytes([b]) for b in range(256)}


def test_text_that_is_not_unicode_is_the_requests_error() -> None:
    tokenizer = Tokenizer(sentencepiece_bpe(), config={}, templates={})
    with pytest.raises(RequestError, match="not valid Unicode"):
        tokenizer.encode("a\ud800")


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="looked for tokenizer.json, tokenizer.model"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer.json: not a tokenizer"):
        load(tmp_path)
    checkpoint(tmp_path, tokenizer_config__json="[1]")
    with pytest.raises(CheckpointError, match="tokenizer_config.json: got list"):
        load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer_config.json: cannot be read"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("tokenizer_config", "added_tokens_decoder", [1]),
        ("tokenizer_config", "added_tokens_decoder", {"x": {"content": "a"}}),
        ("tokenizer_config", "added_tokens_decoder", {"2": {"wob": "a"}}),
        ("tokenizer_config", "added_tokens_decoder", {"2": "a"}),
        ("tokenizer_config", "added_tokens_decoder", {"2": {"content": "a", "lstrip": 1}}),
        ("tokenizer_config", "extra_special_tokens", "a"),
        ("tokenizer_config", "extra_special_tokens", [1]),
        ("tokenizer_config", "extra_special_tokens", [{"lstrip": True}]),
        ("generation_config", "eos_token_id", "x"),
        ("generation_config", "eos_token_id", [{}]),
        ("generation_config", "eos_token_id", 2.0),
    ],
)
def test_fields_of_another_type_are_named(
    tmp_path: Path, file: str, field: str, value: object
) -> None:
    folder = checkpoint(tmp_path, tokenizer_config__json=config())
    (folder / f"{file}.json").write_text(json.dumps({field: value}))
    with pytest.raises(CheckpointError, match=f"{field}: got") as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_prompts_are_never_cut_or_padded_by_the_file(tmp_path: Path) -> None:
    backend = byte_level().from_str(byte_level().to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(load(tmp_path).encode(CORPUS[0])) == len(byte_level().encode(CORPUS[0]).ids) > 4


def test_neither_torch_nor_transformers_is_imported(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, tokenizer_config__json=config(chat_template=CHATML))
    code = (
        "import sys; from pathlib import Path; from windlass.engine.tokenizer import load;"
        "from windlass.engine import detokenizer; t = load(Path(sys.argv[1]));"
        "t.apply_chat_template([{'role': 'user', 'content': 'x'}]);"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, folder], check=False).returncode == 0


def gpt2_files(folder: Path) -> Path:
    """GPT-2's own files, without tokenizer.json."""
    model = json.loads(byte_level().to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "unk_token": "<|endoftext|>"})
    )
    return folder


def test_a_slow_tokenizer_is_converted_by_transformers(tmp_path: Path) -> None:
    tokenizer = load(gpt2_files(tmp_path))
    assert tokenizer.encode("The quick fox") == byte_level().encode("The quick fox").ids
    assert tokenizer.decode(tokenizer.encode("你好 fox")) == "你好 fox"


def test_without_transformers_a_slow_tokenizer_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it fails
    with pytest.raises(CheckpointError) as caught:
        load(gpt2_files(tmp_path))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: no tokenizer.json, got vocab.json")
    assert "pip install transformers" in message
    byte_level().save(str(tmp_path / "tokenizer.json"))
    assert load(tmp_path).encode("The quick fox")  # transformers was needed for nothing else
