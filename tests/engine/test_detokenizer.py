"""TextStream: deltas add up to the text, characters stay whole, stop strings are cut."""

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizers_for_tests import ALL
from windlass.engine.detokenizer import TextStream
from windlass.engine.tokenizer import Tokenizer
from windlass.params import SamplingParams

TOKENIZERS = {name: Tokenizer(build(), config={}, templates={}) for name, build in ALL.items()}
UNICODE = [name for name in TOKENIZERS if name != "word_piece"]  # it knows no other characters

TEXTS = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from("ab \n你好é👩‍🎉<|▁'STOP"),
    ),
    max_size=40,
)


def stream_of(name: str, **params: Any) -> TextStream:
    return TextStream(TOKENIZERS[name], SamplingParams(**params))


def after_anchor(name: str, ids: list[int], *, skip_special_tokens: bool = True) -> str:
    """What `ids` add to a text: the slow twin decodes all of it at once."""
    tokenizer = TOKENIZERS[name]
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
    before = tokenizer.decode(anchor)
    whole = tokenizer.decode([*anchor, *ids], skip_special_tokens=skip_special_tokens)
    return whole.removeprefix(before)


@pytest.mark.parametrize("name", UNICODE)
@settings(deadline=None, max_examples=150)
@given(text=TEXTS)
def test_deltas_add_up_to_the_decoded_text(name: str, text: str) -> None:
    ids = TOKENIZERS[name].encode(text, add_special_tokens=False)
    stream = stream_of(name)
    deltas = [stream.push(token_id) for token_id in ids] + [stream.finish()]
    assert "".join(deltas) == stream.text == after_anchor(name, ids)
    if "\ufffd" not in text and "<unk>" not in stream.text:
        assert "\ufffd" not in stream.text


@pytest.mark.parametrize("name", list(TOKENIZERS))
@settings(deadline=None, max_examples=60)
@given(data=st.data(), skip=st.booleans())
def test_any_ids_stream_like_they_decode(name: str, data: st.DataObject, skip: bool) -> None:
    """Ids at random: specials, added tokens, and bytes that are no characters."""
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=25))
    if not skip and name != "byte_level":
        ids = [token_id for token_id in ids if token_id not in tokenizer.special_ids]
    stream = stream_of(name, skip_special_tokens=skip)
    streamed = "".join([stream.push(token_id) for token_id in ids])
    decoded = after_anchor(name, ids, skip_special_tokens=skip)
    # an unfinished character at the end is held; one bad byte spoils a whole run of bytes when
    # decoded at once
    if "ByteFallback" in tokenizer._decoders and "\ufffd" in decoded:
        assert streamed.replace("\ufffd", "").startswith(decoded.split("\ufffd")[0])
    else:
        assert decoded.rstrip("\ufffd") == streamed.rstrip("\ufffd")


@pytest.mark.parametrize("name", UNICODE)
def test_a_character_never_appears_in_parts(name: str) -> None:
    ids = TOKENIZERS[name].encode("x🦊龍𝄞好", add_special_tokens=False)
    stream = stream_of(name)
    deltas = [stream.push(token_id) for token_id in ids]
    assert len(ids) > 10  # the characters are split over tokens
    assert all("\ufffd" not in delta for delta in deltas)
    assert "🦊" in deltas and "龍" in deltas


def test_bytes_that_are_no_character_appear_as_replacement_and_an_unfinished_end_does_not() -> None:
    tokenizer = TOKENIZERS["sentencepiece_bpe"]
    byte = {i: tokenizer.special_text(i) for i in range(tokenizer.vocab_size)}
    of = {text: i for i, text in byte.items()}
    stream = stream_of("sentencepiece_bpe")
    names = ["<0xE4>", "<0xBD>", "<0xA0>", "<0xFF>", "<0x41>", "<0xF0>", "<0x9F>"]
    assert [stream.push(of[name]) for name in names] == ["", "", "你", "\ufffd", "A", "", ""]
    assert stream.finish() == ""
    assert stream.text == "你\ufffdA"


def push_all(stream: TextStream, ids: list[int]) -> list[str]:
    """What an engine does: pushes until a stop string, then finishes."""
    deltas = []
    for token_id in ids:
        deltas.append(stream.push(token_id))
        if stream.stop_hit is not None:
            break
    return [*deltas, stream.finish()]


@pytest.mark.parametrize("name", UNICODE)
@pytest.mark.parametrize("include", [False, True])
@settings(deadline=None, max_examples=60)
@given(
    text=st.text("abST", max_size=30),
    stops=st.lists(st.text("abST", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_stop_strings_end_the_text_whatever_the_tokens(
    name: str, include: bool, text: str, stops: list[str]
) -> None:
    ids = TOKENIZERS[name].encode(text, add_special_tokens=False)
    whole = after_anchor(name, ids)
    # slow twin: grow the text by characters; the first stop string complete ends it
    hits = [(whole.find(s) + len(s), whole.find(s), s) for s in stops if s in whole]
    end, start, stop = min(hits, default=(len(whole), len(whole), None))
    stream = stream_of(name, stop=stops, include_stop_str_in_output=include)
    deltas = push_all(stream, ids)
    assert stream.stop_hit == stop
    assert "".join(deltas) == stream.text == whole[: end if include else start]


def test_text_is_held_only_while_it_may_become_a_stop_string() -> None:
    stream = stream_of("byte_level", stop=["abcd", "bx"])
    of = {TOKENIZERS["byte_level"].special_text(i): i for i in range(260)}
    deltas = [stream.push(of[char]) for char in "zabcabcx"]
    # "abc" is let go when it is not followed by d; its end "b" could not start "bx" after "c"
    assert deltas == ["z", "", "", "", "abc", "", "", "abcx"]
    assert stream.finish() == "" and stream.stop_hit is None
    stream = stream_of("byte_level", stop="abcd")
    assert [stream.push(of[char]) for char in "xazab"] == ["x", "", "az", "", ""]
    assert stream.finish() == "ab" and stream.finish() == ""


def test_stop_strings_count_only_after_min_tokens() -> None:
    of = {TOKENIZERS["byte_level"].special_text(i): i for i in range(260)}

    def run(text: str, *stops: str, **params: Any) -> tuple[str, str | None]:
        stream = stream_of("byte_level", stop=["ab", *stops], **params)
        push_all(stream, [of[char] for char in text])
        return stream.text, stream.stop_hit

    assert run("ababab", min_tokens=0) == ("", "ab")
    assert run("ababab", min_tokens=2) == ("ab", "ab")
    assert run("ababab", min_tokens=3) == ("ab", "ab")  # ends after, may begin before
    assert run("ababab", min_tokens=6) == ("ababab", None)
    # held as the beginning of another one, and complete too early
    assert run("xabz", "xaby", min_tokens=3) == ("xabz", None)


def test_of_several_stop_strings_in_one_token_the_first_complete_one_counts() -> None:
    think = TOKENIZERS["byte_level"].encode("<think>")
    assert len(think) == 1
    for stops, hit, text in (
        (["k>", "<t", "think"], "<t", ""),
        (["k>", "nk", "ink"], "ink", "<th"),
    ):
        stream = stream_of("byte_level", stop=stops)
        assert push_all(stream, think) == [text, ""]
        assert (stream.stop_hit, stream.text) == (hit, text)


def test_special_tokens_are_shown_only_when_asked_for() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = [1, *tokenizer.encode("hi"), 2, tokenizer.encode("<think>")[0]]
    for skip, text in ((True, "hi<think>"), (False, "<|im_start|>hi<|im_end|><think>")):
        stream = stream_of("byte_level", skip_special_tokens=skip)
        assert "".join(push_all(stream, ids)) == text
    stream = stream_of("byte_level", detokenize=False)
    assert push_all(stream, ids) == [""] * (len(ids) + 1)


def test_spaces_between_special_tokens() -> None:
    ids = [1, 1, 0]  # WordPiece's decoder sets a space before every word
    for spaces, text in ((True, " [SEP] [SEP] [UNK]"), (False, " [SEP][SEP][UNK]")):
        stream = stream_of(
            "word_piece", skip_special_tokens=False, spaces_between_special_tokens=spaces
        )
        assert "".join(push_all(stream, ids)) == text


def test_a_push_does_not_decode_what_came_before(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TOKENIZERS["metaspace_unigram"]
    ids = tokenizer.encode("the quick brown fox", add_special_tokens=False)
    stream = stream_of("metaspace_unigram", stop=["never"])
    decoded: list[int] = []
    original = tokenizer.decode

    def counting(token_ids: list[int], **options: Any) -> str:
        decoded.append(len(token_ids))
        return original(token_ids, **options)

    monkeypatch.setattr(tokenizer, "decode", counting)
    for token_id in itertools.islice(itertools.cycle(ids), 2000):
        stream.push(token_id)
    assert sum(decoded) <= 3 * len(set(ids))  # each token once, beside its anchor
