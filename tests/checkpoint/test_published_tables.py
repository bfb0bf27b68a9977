"""Tensors of published checkpoints, by names and shapes that their headers have."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

import published_tables as tables
from published import PUBLISHED
from quantised_cases import compressed
from windlass.checkpoint.layout import build_layout, expected_stored
from windlass.ids import Part, WeightKey
from windlass.models.names import TensorInfo
from windlass.models.registry import read_description, read_spec

_PLAIN = ("lm_head", "re:.*self_attn.*", "re:.*shared_experts.*",
          r"re:.*mlp\.(gate|up|gate_up|down)_proj.*")  # fmt: skip


def _kimi_k2_5() -> dict[str, Any]:
    settings = compressed("pack-quantized", ignore=_PLAIN, strategy="group", group_size=32)
    text = {**PUBLISHED["kimi_k2"][0], "model_type": "kimi_k2", "num_hidden_layers": 2}
    return {"model_type": "kimi_k25", "text_config": {**text, "quantization_config": settings}}


def _glm_4_7_flash() -> dict[str, Any]:
    few = dict(num_hidden_layers=2, mlp_layer_types=["dense", "sparse"])
    return {**PUBLISHED["glm4_moe_lite"][0], "model_type": "glm4_moe_lite", **few}


def _tensors(table: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    for line in table.split("\n")[1:-1]:
        pattern, shape = line.split()
        names = [pattern]
        while match := re.search(r"\{(\d+)-(\d+)\}", names[0]):
            span = range(int(match[1]), int(match[2]) + 1)
            names = [name.replace(match[0], str(i), 1) for name in names for i in span]
        for name in names:
            yield name, tuple(int(size) for size in shape.split(","))


@pytest.mark.parametrize(
    ("config", "read", "unread"),
    [
        (_kimi_k2_5(), tables.KIMI_K2_5, tables.KIMI_K2_5_UNREAD),
        (_glm_4_7_flash(), tables.GLM_4_7_FLASH, tables.GLM_4_7_FLASH_UNREAD),
    ],
    ids=["kimi-k2.5", "glm-4.7-flash"],
)
def test_the_model_reads_what_is_there(config: dict[str, Any], read: str, unread: str) -> None:
    spec, names = read_spec(config)
    expected = expected_stored(spec, names)
    assert {name: one.shape for name, one in expected.items()} == dict(_tensors(read))
    infos = {}
    for name, shape in (*_tensors(read), *_tensors(unread)):
        dtype = "I32" if name.endswith(("_packed", "_shape")) else "BF16"
        infos[name] = TensorInfo(name, "model.safetensors", dtype, shape, 0, 0)
    layout = build_layout(spec, names, infos)
    assert layout.unused == tuple(sorted(name for name, _ in _tensors(unread)))


def test_so_does_the_layer_that_drafts() -> None:
    """GLM-4.7-Flash, whose layer for multi-token prediction has the model's own embedding and
    head beside it."""
    found = read_description(_glm_4_7_flash(), drafts=True)
    infos = {}
    for name, shape in _tensors(tables.GLM_4_7_FLASH + tables.GLM_4_7_FLASH_NEXTN[1:]):
        infos[name] = TensorInfo(name, "model.safetensors", "BF16", shape, 0, 0)
    layout = build_layout(found.spec, found.names, infos)
    layer = "model.layers.2."
    assert layout.unused == (f"{layer}embed_tokens.weight", f"{layer}shared_head.head.weight")
    assert WeightKey(Part.JOIN, 2) in layout.parts
