"""Tries files of published checkpoints, without weights: is each read, or refused with its reason?

real_files.py DIR [KIND ...]. DIR has some of these folders, each with any number of entries:
configs/NAME/config.json; tables/NAME.txt (a line "tensor shape type" for each tensor, {a-b} for a
range of numbers; shape 3,4; # begins a remark), each tried with the config.json of the same name;
indexes/NAME/ (config.json, model.safetensors.index.json); templates/NAME.jinja; tokenizers/NAME/
(tokenizer.json, perhaps gzipped, or tokenizer.model). KIND: only these of the folders.

Templates are compared with transformers, tokenizers with tokenizers and sentencepiece. Exit code 1
if one differs, or if anything is raised but errors of one line.
"""

import argparse
import gzip
import itertools
import json
import logging
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from windlass.checkpoint.folder import read_model
from windlass.checkpoint.layout import expected_of, with_stored_head
from windlass.checkpoint.locate import find, trunk_prefix
from windlass.checkpoint.safetensors import (
    DTYPE_BITS,
    INDEX_FILE,
    encode_header,
    natural_key,
    shard_name,
)
from windlass.checkpoint.wanted import all_wanted
from windlass.engine.chat_template import ChatTemplate
from windlass.engine.tokenizer import load
from windlass.errors import WindlassError
from windlass.models.names import TensorInfo
from windlass.models.registry import read_description
from windlass.options import EngineOptions, read_config
from windlass.perf.flops import num_parameters

_SHARD_TENSORS = 50_000
_RANGE = re.compile(r"\{(\d+)-(\d+)\}")
_SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
_TOOLS = [
    {"type": "function", "function": {
        "name": "weather", "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}},
                       "required": ["city"]},
    }},
]  # fmt: skip
_PLAIN = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A model."},
    {"role": "user", "content": "  Whose <b>model</b>, \"exactly\"? é\n"},
]  # fmt: skip
CONVERSATIONS: Mapping[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "plain": (_PLAIN, None),
    "one question": (_PLAIN[1:2], None),
    "tools": (_PLAIN[1:2], _TOOLS),
}
TEXTS = (
    "", " ", "Hello, world!", " leading", "  two spaces", "trailing  ", "tab\tand\n\nlines\r\n",
    "na\u00efve caf\u00e9 Z\u00fcrich", "\u6f22\u5b57\u3068\u304b\u306a",
    "\u0440\u0443\u0441\u0441\u043a\u0438\u0439", "\U0001f642\U0001f469\u200d\U0001f467 faces",
    "x = [1, 22, 333] ** 4.5e-6", "don't you'LL WE'VE", "https://example.org/a?b=c&d=%20",
    "a" * 300, "\u0000\u200b\ufeff", "e\u0301 against \u00e9",
)  # fmt: skip


Stored = tuple[tuple[int, ...], str]  # shape and type of a tensor


class Row(NamedTuple):
    """How one file went."""

    file: str
    outcome: str  # read, refused, DIFFERENT or RAISED
    detail: str

    @property
    def is_fault(self) -> bool:
        return self.outcome.isupper()


class Difference(Exception):
    """Another result than the reference's."""


def attempt(file: str, read: Callable[[], str]) -> Row:
    """What became of reading a file; `read` says what it found."""
    try:
        return Row(file, "read", read())
    except WindlassError as error:
        return Row(file, "RAISED" if "\n" in str(error) else "refused", str(error))
    except Difference as error:
        return Row(file, "DIFFERENT", str(error))
    except Exception as error:  # noqa: BLE001  what the table is for
        return Row(file, "RAISED", f"{type(error).__name__}: {error}")


# --- configurations -------------------------------------------------------------------------------


def try_config(folder: Path) -> str:
    found = read_description(read_config(folder))
    quantized = found.names.quantization
    stored = f", {quantized.method}" if quantized else ""
    parameters = num_parameters(found.spec)
    return "; ".join([f"{found.spec.family}, {parameters} parameters{stored}", *found.notes])


# --- headers --------------------------------------------------------------------------------------


def expand(name: str) -> Iterator[str]:
    """All names that `{a-b}` in a name stands for."""
    parts = _RANGE.split(name)  # text, first, last, text, ...
    ranges = zip(parts[1::3], parts[2::3], strict=True)
    numbers = [range(int(first), int(last) + 1) for first, last in ranges]
    for chosen in itertools.product(*numbers):
        text = itertools.zip_longest(parts[::3], map(str, chosen), fillvalue="")
        yield "".join(itertools.chain.from_iterable(text))


def read_table(text: str) -> dict[str, Stored]:
    """Shape and type of every tensor of a table."""
    tensors: dict[str, Stored] = {}
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            name, *shape, kind = line.split()
            sizes = tuple(int(size) for size in shape[0].split(",")) if shape else ()
            tensors.update(dict.fromkeys(expand(name), (sizes, kind)))
    return tensors


def words(name: str) -> Counter[str]:
    return Counter(re.findall(r"[a-z0-9]+", name.lower()))


def matching(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate that has all words of `name` and fewest others."""
    own = words(name)
    fitting = [each for each in candidates if own <= words(each)]
    return min(fitting, key=lambda each: words(each).total(), default=None)


def write_headers(folder: Path, tensors: Mapping[str, Stored]) -> None:
    """Sparse safetensors files that hold `tensors`, and their index."""
    ordered = sorted(tensors, key=natural_key)
    starts = range(0, len(ordered), _SHARD_TENSORS)
    groups = [ordered[first : first + _SHARD_TENSORS] for first in starts]
    weight_map = {}
    for number, group in enumerate(groups):
        file, at, infos = shard_name(number, len(groups)), 0, []
        for name in group:
            shape, kind = tensors[name]
            end = at + prod(shape) * DTYPE_BITS[kind] // 8
            infos.append(TensorInfo(name, file, kind, shape, at, end))
            weight_map[name], at = file, end
        header = encode_header(infos)
        with (folder / file).open("wb") as stream:
            stream.write(header)
            stream.truncate(len(header) + at)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


def try_headers(config: Path, tensors: Mapping[str, Stored]) -> str:
    """The layout over files with these tensors, beside the config.json `config`."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as opened:
        folder = Path(name)
        shutil.copy(config, folder / "config.json")
        write_headers(folder, tensors)
        model = read_model(EngineOptions(model=name, load_mode="buffered"), opened)
        unused = len(model.layout.unused)
        return "; ".join(
            [
                f"{len(tensors) - unused} tensors claimed, {unused} left unread,"
                f" {num_parameters(model.spec)} parameters",
                *model.notes,
            ]
        )


def try_table(table: Path, configs: Path) -> str:
    """Raises Difference where no config.json goes with it."""
    found = matching(table.stem, [path.name for path in configs.iterdir()])
    if found is None:
        raise Difference(f"no folder of {configs} has all words of this name")
    return try_headers(configs / found / "config.json", read_table(table.read_text()))


def assumed_type(name: str, names: Mapping[str, object]) -> str:
    """What a tensor is most likely stored as, by its name and its neighbours'."""
    if name.endswith(("_blocks", "_scales")):
        return "U8"
    if name.endswith(("weight_packed", "qweight", "qzeros", "g_idx")):
        return "I32"
    is_scaled = f"{name}_scale_inv" in names or f"{name}_scale" in names
    return "F8_E4M3" if is_scaled else "BF16"


def try_index(folder: Path) -> str:
    """An index has names alone: shapes and types are those that the model wants of them."""
    weight_map = json.loads((folder / INDEX_FILE).read_bytes())["weight_map"]
    stub = {
        name: TensorInfo(name, file, assumed_type(name, weight_map), (), 0, 0)
        for name, file in weight_map.items()
    }
    described = read_description(read_config(folder))
    names, prefix = described.names, trunk_prefix(described.names, stub)
    spec = with_stored_head(described.spec, names, stub)
    tensors: dict[str, Stored] = {name: ((), info.dtype) for name, info in stub.items()}
    for wanted in all_wanted(spec, names):
        found = find(wanted, names, prefix, stub)
        for name, expected in expected_of(wanted, found.source, names, prefix):
            kind = expected.stored.dtypes[0] if expected.stored else "BF16"
            tensors[name] = (expected.shape, kind)
    missing = sorted(set(tensors) - set(weight_map))
    if missing:
        raise Difference(f"{len(missing)} tensors are expected and not in the index: {missing[0]}")
    return try_headers(folder / "config.json", tensors)


# --- text -----------------------------------------------------------------------------------------


def try_template(file: Path) -> str:
    """Raises Difference where a conversation is rendered otherwise than by transformers, and the
    template's own error where both render none."""
    text = file.read_text(encoding="utf-8")
    refused: dict[str, WindlassError] = {}
    for name, (messages, tools) in CONVERSATIONS.items():
        expected = _reference(text, messages, tools)
        try:
            got = ChatTemplate({"default": text}, _SPECIALS).render(messages, tools=tools)
        except WindlassError as error:
            if isinstance(expected, str):
                raise Difference(f"{name}: {error}; transformers renders it") from error
            refused[name] = error
            continue
        if isinstance(expected, Exception):
            raise Difference(f"{name}: is rendered; transformers: {expected!r:.100}")
        if got != expected:
            at = first_difference(got, expected)
            there = repr(expected[at : at + 40])
            raise Difference(f"{name}: at {at} {got[at : at + 40]!r}, transformers {there}")
    if len(refused) == len(CONVERSATIONS):
        raise next(iter(refused.values()))
    return "; ".join(["as transformers", *(f"{name}: {each}" for name, each in refused.items())])


def first_difference(one: str, other: str) -> int:
    """Where two different texts part."""
    pairs = enumerate(itertools.zip_longest(one, other))
    return next(place for place, (a, b) in pairs if a != b)


def _reference(
    text: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> str | Exception:
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered, _ = render_jinja_template(
            conversations=[messages], tools=tools, chat_template=text, add_generation_prompt=True,
            **_SPECIALS,
        )  # fmt: skip
    except Exception as error:  # noqa: BLE001  templates raise what they like
        return error
    return str(rendered[0])


def try_tokenizer(folder: Path) -> str:
    """Raises Difference where a text has other ids than by the libraries."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for path in folder.iterdir():
            if path.suffix == ".gz":
                (copy / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
            else:
                shutil.copy(path, copy / path.name)
        ours, ids_of = load(copy), _reference_ids(copy)
    for text in TEXTS:
        got, expected = ours.encode(text, add_special_tokens=False), list(ids_of(text))
        if got != expected:
            raise Difference(f"{text!r:.40}: got {got[:12]}, the library {expected[:12]}")
    return f"{ours.vocab_size} tokens, {len(TEXTS)} texts as the library"


def _reference_ids(folder: Path) -> Callable[[str], Iterable[int]]:
    """The library's own ids of a text, without special tokens around it."""
    import sentencepiece
    import tokenizers

    file = folder / "tokenizer.json"
    if not file.exists():
        processor = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
        return processor.encode
    backend = tokenizers.Tokenizer.from_file(str(file))
    return lambda text: backend.encode(text, add_special_tokens=False).ids


# --- all ------------------------------------------------------------------------------------------


def rows(root: Path, kinds: Iterable[str]) -> Iterator[Row]:
    """One for each entry of the folders that are there."""
    tries: dict[str, Callable[[Path], str]] = {
        "configs": try_config,
        "tables": lambda path: try_table(path, root / "configs"),
        "indexes": try_index,
        "templates": try_template,
        "tokenizers": try_tokenizer,
    }
    for kind in kinds:
        if (root / kind).is_dir():
            for path in sorted((root / kind).iterdir()):
                yield attempt(f"{kind}/{path.name}", partial(tries[kind], path))


def main(arguments: list[str]) -> int:
    """Prints the table; 1 if a row is a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = ("configs", "tables", "indexes", "templates", "tokenizers")
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(kinds))
    given = parser.parse_args(arguments)
    unknown = [kind for kind in given.kinds if kind not in kinds]
    if unknown:
        parser.error(f"kind: got {unknown[0]!r}, allowed {', '.join(kinds)}")
    logging.getLogger("windlass").addHandler(logging.NullHandler())  # notes are in the table
    outcomes: Counter[str] = Counter()
    for row in rows(given.folder, given.kinds or kinds):
        print(f"| {row.file} | {row.outcome} | {row.detail} |", flush=True)
        outcomes[row.outcome] += 1
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())))
    return int(any(outcome.isupper() for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
