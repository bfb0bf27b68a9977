"""The script that tries published files, on a folder of small ones."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from layouts import expected_tensors
from published import SMALL_MIXTRAL
from tokenizers_for_tests import ALL
from windlass.models.registry import read_spec

sys.path.insert(0, str(Path(__file__).parents[2]))
from scripts import real_files

TABLE = """# of layers that are alike
lm_head.weight 50,16 BF16
model.embed_tokens.weight 50,16 BF16
model.norm.weight 16 BF16
model.layers.{0-1}.input_layernorm.weight 16 BF16
model.layers.{0-1}.post_attention_layernorm.weight 16 BF16
model.layers.{0-1}.self_attn.q_proj.weight 16,16 BF16
model.layers.{0-1}.self_attn.k_proj.weight 8,16 BF16
model.layers.{0-1}.self_attn.v_proj.weight 8,16 BF16
model.layers.{0-1}.self_attn.o_proj.weight 16,16 BF16
model.layers.{0-1}.block_sparse_moe.gate.weight 4,16 F32
model.layers.{0-1}.block_sparse_moe.experts.{0-3}.w1.weight 24,16 BF16
model.layers.{0-1}.block_sparse_moe.experts.{0-3}.w2.weight 16,24 BF16
model.layers.{0-1}.block_sparse_moe.experts.{0-3}.w3.weight 24,16 BF16
model.layers.0.self_attn.k_scale F32
"""


def add_config(root: Path, name: str, config: dict[str, Any]) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def outcomes(root: Path, *kinds: str) -> list[tuple[str, str]]:
    return [(row.file, row.outcome) for row in real_files.rows(root, kinds)]


def test_ranges() -> None:
    assert list(real_files.expand("a")) == ["a"]
    assert list(real_files.expand("l.{9-10}.e.{0-1}.w")) == [
        "l.9.e.0.w", "l.9.e.1.w", "l.10.e.0.w", "l.10.e.1.w"
    ]  # fmt: skip


def test_a_table_has_the_shapes_and_types_of_all_tensors() -> None:
    tensors = real_files.read_table(TABLE)
    spec, names = read_spec(SMALL_MIXTRAL)
    shapes = {name: shape for name, (shape, _) in tensors.items() if not name.endswith("scale")}
    assert shapes == expected_tensors(spec, names)
    assert tensors["model.layers.1.block_sparse_moe.gate.weight"] == ((4, 16), "F32")
    assert tensors["model.layers.0.self_attn.k_scale"] == ((), "F32")


def test_the_config_that_goes_with_a_table() -> None:
    configs = ["org--Model-V3.2", "org--Model-V3", "org--Model-V3-Chat-FP8"]
    assert real_files.matching("model_v3", configs) == "org--Model-V3"
    assert real_files.matching("model_v3_fp8", configs) == "org--Model-V3-Chat-FP8"
    assert real_files.matching("other", configs) is None


def test_configurations_and_headers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_config(tmp_path, "configs/org--Tiny", {**SMALL_MIXTRAL, "odd": 1})
    add_config(tmp_path, "configs/org--Dense", {"model_type": "llama"})
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/tiny.txt").write_text(TABLE)
    (tmp_path / "tables/dense.txt").write_text(TABLE)
    (tmp_path / "notes.txt").write_text("not a folder of ours")
    assert real_files.main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        "| configs/org--Dense | refused | config.json: model_type is 'llama'"
    )
    assert lines[1] == (
        "| configs/org--Tiny | read | mixtral, 12560 parameters;"
        " config.json: not known, not read: odd = 1 |"
    )
    assert lines[2].startswith("| tables/dense.txt | refused | ")
    assert lines[3].startswith(
        "| tables/tiny.txt | read | 41 tensors claimed, 1 left unread, 12560 parameters;"
    )
    assert lines[4:] == ["2 read, 2 refused"]


def test_an_index_is_tried_by_its_names(tmp_path: Path) -> None:
    spec, names = read_spec(SMALL_MIXTRAL)
    weight_map = dict.fromkeys(expected_tensors(spec, names), "a.safetensors")
    for name, changes in (
        ("whole", {"model.mtp.norm.weight": "a.safetensors"}),
        ("strange", {"model.layers.0.strange.weight": "a.safetensors"}),
    ):
        folder = add_config(tmp_path, f"indexes/{name}", SMALL_MIXTRAL)
        document = {"weight_map": {**weight_map, **changes}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(document))
    assert outcomes(tmp_path, "indexes") == [
        ("indexes/strange", "refused"), ("indexes/whole", "read")
    ]  # fmt: skip


def test_packed_tensors_of_an_index_are_known_by_their_names() -> None:
    names = ["a.weight", "a.weight_scale_inv", "b.weight", "c.qweight", "c.scales", "d_blocks"]
    assert [real_files.assumed_type(name, dict.fromkeys(names)) for name in names] == [
        "F8_E4M3", "BF16", "BF16", "I32", "BF16", "U8"
    ]  # fmt: skip


def test_templates_and_tokenizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "templates").mkdir()
    loop = "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}{% endfor %}"
    for name, text in (("a", loop), ("b", "{{ raise_exception('no') }}"), ("c", "{% for %}")):
        (tmp_path / f"templates/{name}.jinja").write_text(text)
    folder = tmp_path / "tokenizers/words"
    folder.mkdir(parents=True)
    ALL["byte_level"]().save(str(folder / "tokenizer.json"))
    expected = [("templates/a.jinja", "read"), ("templates/b.jinja", "refused"),
                ("templates/c.jinja", "refused"), ("tokenizers/words", "read")]  # fmt: skip
    assert outcomes(tmp_path, "templates", "tokenizers") == expected
    monkeypatch.setattr(real_files, "_reference_ids", lambda folder: list)
    monkeypatch.setattr(real_files, "_reference", lambda *of: "something else")
    assert [outcome for _, outcome in outcomes(tmp_path, "templates", "tokenizers")] == [
        "DIFFERENT"
    ] * 4


def test_what_is_no_error_of_one_line_is_a_fault(tmp_path: Path) -> None:
    folder = add_config(tmp_path, "configs/a", SMALL_MIXTRAL)
    assert real_files.main([str(tmp_path)]) == 0
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()  # cannot be read, and is refused in one line
    assert outcomes(tmp_path, "configs") == [("configs/a", "refused")]

    def broken() -> str:
        raise KeyError("hidden_size")

    assert real_files.attempt("a", broken).is_fault
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/of_nothing.txt").write_text("")
    assert real_files.main([str(tmp_path), "tables"]) == 1
    with pytest.raises(SystemExit):
        real_files.main([str(tmp_path), "tabels"])
