"""Finding canonical tensors among a checkpoint's tensors, and what is said when they do not fit."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors import safe_open

from delta_model import DELTA_CASES
from families import ALIKE, CASES, make_checkpoint
from layouts import expected_tensors
from published import SMALL_MIXTRAL
from windlass.checkpoint.layout import build_layout, with_stored_head
from windlass.errors import CheckpointError
from windlass.ids import Part, WeightKey
from windlass.models.names import Layout, NameMap, TensorInfo
from windlass.models.registry import read_description, read_spec
from windlass.models.spec import ModelSpec

UNREAD = re.compile(r"\.indexer\.|^(model\.visual|vision_tower|mm_projector)\.")
GATE = "model.layers.1.block_sparse_moe.gate.weight"


def tensors_of(shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(name, "model.safetensors", dtype, shape, 0, 2 * prod(shape))
        for name, shape in shapes.items()
    }


def mixtral(**changes: Any) -> tuple[ModelSpec, NameMap, dict[str, TensorInfo]]:
    spec, names = read_spec({**SMALL_MIXTRAL, **changes})
    return spec, names, tensors_of(expected_tensors(spec, names))


@pytest.fixture(scope="module", params=[*CASES, *ALIKE])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    make_checkpoint(request.param, path)
    return path


def read(path: Path) -> tuple[ModelSpec, NameMap, dict[str, tuple[int, ...]]]:
    shapes = {}
    with safe_open(path / "model.safetensors", "pt") as file:
        for name in file.keys():
            shapes[name] = tuple(file.get_slice(name).get_shape())
    return *read_spec(json.loads((path / "config.json").read_text())), shapes


def test_expected_tensors_are_what_transformers_saves(saved: Path) -> None:
    spec, names, shapes = read(saved)
    read_ones = {name: shape for name, shape in shapes.items() if not UNREAD.search(name)}
    assert expected_tensors(spec, names) == read_ones


def test_every_element_is_read_once(saved: Path) -> None:
    spec, names, shapes = read(saved)
    layout = build_layout(spec, names, tensors_of(shapes), head_chunk_bytes=500)
    assert layout.unused == tuple(sorted(filter(UNREAD.search, shapes)))
    shapes = {name: shape for name, shape in shapes.items() if name not in layout.unused}
    parts = set(layout.parts)
    if spec.tied_head:
        parts -= set(layout.keys(Part.HEAD))  # the embedding table, read again
    assert coverage(layout, parts) == {name: prod(shape) for name, shape in shapes.items()}


def coverage(layout: Layout, keys: Iterable[WeightKey]) -> dict[str, int]:
    """Elements of each tensor that pieces read. Ranges of a tensor are equal or disjoint."""
    ranges: dict[str, set[tuple[int, int]]] = {}
    for key in keys:
        for piece in layout.parts[key]:
            ranges.setdefault(piece.tensor, set()).add((piece.start, piece.stop))
    for name, spans in ranges.items():
        ordered = sorted(spans)
        for (_, end), (begin, _) in zip(ordered, ordered[1:], strict=False):
            assert end <= begin, f"{name}: ranges overlap"
    return {name: sum(stop - start for start, stop in spans) for name, spans in ranges.items()}


def test_every_setting_that_transformers_saves_is_known(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    if config["model_type"] == "dbrx":  # it has them in ffn_config
        assert config.pop("intermediate_size") and config.pop("num_experts_per_tok")
    assert read_description(config).unknown == ()


@pytest.mark.parametrize("family", DELTA_CASES)
def test_every_setting_of_delta_families_is_known(family: str) -> None:
    config = transformers.AutoConfig.for_model(family, **DELTA_CASES[family]).to_dict()
    assert read_description(config).unknown == ()


def test_parts_of_a_model() -> None:
    spec, names, tensors = mixtral()
    layout = build_layout(spec, names, tensors)
    count = Counter(key.part for key in layout.parts)
    assert count == {
        Part.EMBED: 1, Part.BLOCK: 2, Part.EXPERT: 8, Part.FINAL: 1, Part.HEAD: 1
    }  # fmt: skip
    expert = {piece.name: piece for piece in layout.parts[WeightKey(Part.EXPERT, 1, 3)]}
    assert expert["up"].tensor == "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    assert (expert["up"].start, expert["up"].stop, expert["up"].shape) == (0, 384, (24, 16))


@pytest.mark.parametrize("chunk_bytes", [1, 32, 100, 16 * 2 * 50, 1 << 20])
def test_head_in_chunks_of_whole_rows(chunk_bytes: int) -> None:
    spec, names, tensors = mixtral(tie_word_embeddings=True)
    layout = build_layout(spec, names, tensors, head_chunk_bytes=chunk_bytes)
    row, position = 16, 0
    for key in layout.keys(Part.HEAD):
        (piece,) = layout.parts[key]
        assert piece.tensor == "model.embed_tokens.weight"
        assert piece.start == position and piece.stop - piece.start == prod(piece.shape)
        assert piece.shape[1] == row
        assert 2 * prod(piece.shape) <= max(chunk_bytes, 2 * row)
        position = piece.stop
    assert position == 50 * row


@pytest.mark.parametrize(
    ("prefix", "head"),
    [("", "lm_head."), ("model.language_model.", "lm_head."),
     ("language_model.model.", "language_model.lm_head.")],
)  # fmt: skip
def test_prefixes(prefix: str, head: str) -> None:
    spec, names, tensors = mixtral()
    renamed = {
        name.replace("model.", prefix, 1).replace("lm_head.", head): info.shape
        for name, info in tensors.items()
    }
    layout = build_layout(spec, names, tensors_of(renamed))
    assert layout.unused == ()
    assert layout.parts[WeightKey(Part.HEAD, -1, 0)][0].tensor == head + "weight"


def test_fused_rows_become_ranges() -> None:
    config = dict(
        model_type="dbrx", d_model=16, n_heads=4, n_layers=1, max_seq_len=64, vocab_size=50,
        attn_config=dict(kv_n_heads=2, rope_theta=5e5),
        ffn_config=dict(ffn_hidden_size=24, moe_num_experts=4, moe_top_k=2),
    )  # fmt: skip
    spec, names = read_spec(config)
    layout = build_layout(spec, names, tensors_of(expected_tensors(spec, names)))
    block = {piece.name: piece for piece in layout.parts[WeightKey(Part.BLOCK, 0)]}
    key = block["k_proj.weight"]
    assert (key.start, key.stop, key.shape, key.ops) == (16 * 16, 24 * 16, (8, 16), ())
    down = layout.parts[WeightKey(Part.EXPERT, 0, 2)][2]
    assert (down.start, down.stop, down.shape) == (2 * 24 * 16, 3 * 24 * 16, (24, 16))


# --- errors ---------------------------------------------------------------------------------------


def error(spec: ModelSpec, names: NameMap, tensors: dict[str, TensorInfo]) -> str:
    with pytest.raises(CheckpointError) as caught:
        build_layout(spec, names, tensors)
    return str(caught.value)


def test_missing_tensor_is_named() -> None:
    spec, names, tensors = mixtral()
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    message = error(spec, names, tensors)
    for part in ("layers.1.block_sparse_moe.experts.2.w3", "expert[1][2]", "model.safetensors"):
        assert part in message


def test_no_tensors_at_all() -> None:
    spec, names, _ = mixtral()
    assert "model.embed_tokens.weight is missing" in error(spec, names, {})


def test_misshaped_tensor_is_named() -> None:
    spec, names, tensors = mixtral()
    tensors[GATE] = replace(tensors[GATE], shape=(5, 16))
    message = error(spec, names, tensors)
    for part in ("model.safetensors", GATE, "[5, 16]", "[4, 16]", "block[1]"):
        assert part in message


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I32", "F64", "U8"])
def test_unsupported_types(dtype: str) -> None:
    spec, names, tensors = mixtral()
    tensors[GATE] = replace(tensors[GATE], dtype=dtype)
    assert f"{GATE} has type {dtype}, allowed BF16, F16, F32" in error(spec, names, tensors)


@pytest.mark.parametrize("ending", ["weight_blocks", "weight_packed", "qweight"])
def test_packed_tensors_need_a_word_in_the_config(ending: str) -> None:
    spec, names, tensors = mixtral()
    module = "model.layers.0.block_sparse_moe.experts.0.w1."
    tensors[module + ending] = tensors.pop(module + "weight")
    message = error(spec, names, tensors)
    assert f"stored packed, as {module}{ending}" in message
    assert "config.json has no quantization_config" in message


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.block_sparse_moe.experts.4.w1.weight",
        "model.layers.1.block_sparse_moe.shared_expert.gate_proj.weight",
        "model.layers.1.block_sparse_moe.gate.weight_scale_inv",
        "lm_head.bias",
        "model.norm.bias",
    ],
)
def test_tensors_that_the_spec_should_have_used(name: str) -> None:
    spec, names, tensors = mixtral()
    tensors[name] = TensorInfo(name, "b.safetensors", "BF16", (4,), 0, 8)
    message = error(spec, names, tensors)
    assert name in message and "b.safetensors" in message


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("attention_bias", "model.layers.0.self_attn.q_proj.bias"),
        ("use_qk_norm", "model.layers.0.self_attn.q_norm.weight"),
    ],
)
def test_a_flag_that_denies_a_stored_tensor(flag: str, name: str) -> None:
    config = dict(
        SMALL_MIXTRAL,
        model_type="glm4_moe",
        n_routed_experts=4,
        moe_intermediate_size=24,
        head_dim=4,
    )
    spec, names = read_spec({**config, flag: False})
    tensors = tensors_of(expected_tensors(spec, names))
    assert build_layout(spec, names, tensors).unused == ()
    tensors |= tensors_of({name: (16,)})
    assert name in error(spec, names, tensors)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.17.shared_head.head.weight",
        "mtp.layers.0.mlp.gate.weight",
        "model.mtp_block.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.visual.blocks.0.attn.qkv.weight",
        "vision_tower.encoder.weight",
        "mm_projector.proj.0.weight",
        "model.vision_embedder.linear.weight",
        "model.embed_audio.embedding_projection.weight",
        "image_newline",
    ],
)
def test_tensors_that_nobody_needs(name: str) -> None:
    spec, names, tensors = mixtral()
    tensors[name] = TensorInfo(name, "b.safetensors", "I64", (4,), 0, 32)
    layout = build_layout(spec, names, tensors)
    assert layout.unused == (name,) and layout.notes == ()


def nested_mixtral(*more: str) -> tuple[ModelSpec, NameMap, dict[str, TensorInfo]]:
    """A text model under `language_model.`, and tensors beside it."""
    spec, names, tensors = mixtral()
    shapes = {f"language_model.{name}": info.shape for name, info in tensors.items()}
    return spec, names, tensors_of({**shapes, **dict.fromkeys(more, (4,))})


def test_whatever_lies_beside_a_nested_text_model() -> None:
    beside = ("mlp1.0.weight", "qformer.layers.0.weight", "view_seperator")
    assert build_layout(*nested_mixtral(*beside)).unused == tuple(sorted(beside))


@pytest.mark.parametrize(
    "name",
    ["language_model.model.layers.0.self_attn.q_proj.bias", "model.layers.0.mlp.gate.weight",
     "lm_head.bias", "model.norm.bias"],
)  # fmt: skip
def test_what_belongs_to_a_text_model_is_not_beside_it(name: str) -> None:
    assert name in error(*nested_mixtral(name))


def test_layers_that_config_cuts_off_are_named() -> None:
    spec, names, tensors = mixtral(num_hidden_layers=5)
    config_says, _ = read_spec({**SMALL_MIXTRAL, "num_hidden_layers": 3})
    layout = build_layout(config_says, names, tensors)
    assert layout.notes == ("weights: 2 stored layers are left unread, config.json describes 3",)
    joins = tensors_of({f"model.layers.{i}.eh_proj.weight": (16, 32) for i in (3, 4)})
    assert build_layout(config_says, names, tensors | joins).notes == ()


@pytest.mark.parametrize("name", ["lm_head.weight", "language_model.lm_head.weight"])
def test_a_stored_head_is_read_whatever_config_says(name: str) -> None:
    spec, names, tensors = mixtral(tie_word_embeddings=True)
    tensors |= tensors_of({name: (50, 16)})
    assert spec.tied_head and name in error(spec, names, tensors)
    layout = build_layout(with_stored_head(spec, names, tensors), names, tensors)
    assert layout.unused == ()
    assert {p.tensor for key in layout.keys(Part.HEAD) for p in layout.parts[key]} == {name}


def test_tied_model_needs_no_head() -> None:
    spec, names, tensors = mixtral()
    del tensors["lm_head.weight"]
    assert "lm_head.weight" in error(spec, names, tensors)
    tied = replace(spec, tied_head=True)
    assert build_layout(tied, names, tensors).unused == ()
