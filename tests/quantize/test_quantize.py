"""Quantised checkpoints: scales, packing, which tensors, where they lie, and refusals."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from delta_model import DELTA_CASES
from dequantised import dequantised, unpacked
from engines import FAMILIES, make_model
from families import make_checkpoint, rewrite_config
from windlass.checkpoint.safetensors import read_headers
from windlass.errors import CheckpointError, JobError, ModelError, UsageError
from windlass.quantize import convert as job
from windlass.quantize import output_folder as folder_module
from windlass.quantize.rounding import Rounded, pack_rows, round_to_nearest
from windlass.quantize.scheme import IntegerScheme, make_scheme
from windlass.quantize.tensor_errors import kind_lines, tensor_lines

# wide enough for groups of 32 in every matrix
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
SCHEMES = [("int4", 32), ("int4", 64), ("int8", 32), ("int8", None)]


def quantize(source: Path, out: Path, *, scheme: IntegerScheme | None = None, **more: Any) -> Any:
    said: list[str] = []
    options = job.QuantizeOptions(
        model=str(source), out=out, scheme=scheme or make_scheme("int4", 32), **more
    )
    return job.quantize(options, say=said.append), said


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Qwen3-MoE, with a dense layer, and biases in attention."""
    make_model(
        "qwen3_moe", tmp_path / "model", dtype=torch.bfloat16, moe_intermediate_size=32, **WIDE
    )
    return tmp_path / "model"


def weights(kind: str, rows: int = 64, width: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(rows, width, generator=generator) * 0.02
    if kind == "heavy":
        w *= torch.randn(rows, width, generator=generator).abs() ** 3
    if kind == "outlier":
        w[:, 0] = 2.0
    if kind == "one-sided":
        w = -w.abs()
    if kind == "tiny":
        w *= 1e-6
    return w.bfloat16()


def restored(rounded: Rounded, scheme: IntegerScheme) -> torch.Tensor:
    """What the codes and scales mean, in fp32."""
    values = rounded.codes_NK.float() + scheme.lowest
    rows, width = values.shape
    scales = rounded.scales_NB.float()
    return (values.view(rows, scales.shape[1], -1) * scales[:, :, None]).view(rows, width)


def plain_errors(w: torch.Tensor, scheme: IntegerScheme, steps: float) -> torch.Tensor:
    """Squared errors of the groups where the largest element is `steps` steps from zero."""
    w_Gg = w.float().reshape(-1, scheme.group_of(w.shape[1]))
    scale = (w_Gg.abs().amax(-1, keepdim=True) / steps).to(w.dtype).float().clamp_min(1e-30)
    codes = (w_Gg / scale).round().clamp(scheme.lowest, scheme.highest)
    return (codes * scale - w_Gg).square().sum(-1)


# --- the mathematics ---


@pytest.mark.parametrize("kind", ["normal", "heavy", "outlier", "one-sided", "tiny"])
@pytest.mark.parametrize(("name", "group"), SCHEMES)
def test_errors_are_what_is_stored_and_never_larger_than_with_plain_ranges(
    kind: str, name: str, group: int | None
) -> None:
    w, scheme = weights(kind), make_scheme(name, group)
    rounded = round_to_nearest(w, scheme, torch.bfloat16)
    assert rounded.scales_NB.dtype == torch.bfloat16
    assert int(rounded.codes_NK.max()) < 2**scheme.bits
    error = restored(rounded, scheme) - w.float()
    assert rounded.squared_error == pytest.approx(float(error.square().sum()), rel=1e-5)
    assert rounded.squared_sum == pytest.approx(float(w.float().square().sum()), rel=1e-5)
    assert rounded.max_error == pytest.approx(float(error.abs().max()), rel=1e-6)
    per_group = error.square().reshape(-1, scheme.group_of(w.shape[1])).sum(-1)
    for steps in (scheme.highest, scheme.highest + 0.5, scheme.highest + 1):
        assert (per_group <= plain_errors(w, scheme, steps) * 1.00001).all()
    # codes are nearest for the scale on disk: no step up or down is better
    for step in (-1, 1):
        codes = (rounded.codes_NK.int() + step).clamp(0, 2**scheme.bits - 1).to(torch.uint8)
        other = restored(rounded._replace(codes_NK=codes), scheme) - w.float()
        assert (error.abs() <= other.abs() + 1e-12).all()


def test_the_search_is_near_the_best_of_all_scales_and_far_better_than_none() -> None:
    for name, group, gain in (("int4", 32, 0.81), ("int4", 128, 0.76), ("int8", 128, 0.96)):
        scheme, w = make_scheme(name, group), weights("normal")
        found = round_to_nearest(w, scheme, torch.bfloat16).squared_error
        plain = plain_errors(w, scheme, scheme.highest)
        everything = [plain_errors(w, scheme, scheme.highest / (1 - 0.004 * i)) for i in range(200)]
        best = float(torch.stack([*everything, plain]).amin(0).sum())
        assert found < 1.003 * best
        assert found < gain * float(plain.sum())


def test_a_scale_uses_the_longer_side_of_the_range() -> None:
    w = torch.full((1, 32), -8.0)
    w[0, 1:] = torch.arange(31) % 15 - 7
    rounded = round_to_nearest(w, make_scheme("int4", 32), torch.float32)
    assert (rounded.squared_error, rounded.scales_NB.item()) == (0.0, 1.0)
    assert rounded.codes_NK[0, 0] == 0


def test_zeros_are_stored_as_zeros_and_what_is_not_finite_is_refused() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        w = torch.zeros(2, 64, dtype=dtype)
        w[0, 40] = torch.finfo(dtype).tiny / 4
        rounded = round_to_nearest(w, make_scheme("int4", 32), dtype)
        assert rounded.scales_NB.isfinite().all() and (rounded.scales_NB > 0).all()
        assert rounded.codes_NK[1].eq(8).all() and rounded.max_error <= w.abs().max()
    for bad in (torch.nan, torch.inf, -torch.inf):
        w[1, 3] = bad
        with pytest.raises(ValueError, match="not finite"):
            round_to_nearest(w, make_scheme("int4", 32), torch.float32)


def test_a_row_does_not_depend_on_others() -> None:
    w, scheme = weights("heavy"), make_scheme("int4", 64)
    together = round_to_nearest(w, scheme, torch.bfloat16)
    for first, last in ((0, 1), (5, 8), (63, 64)):
        apart = round_to_nearest(w[first:last], scheme, torch.bfloat16)
        assert torch.equal(apart.codes_NK, together.codes_NK[first:last])
        assert torch.equal(apart.scales_NB, together.scales_NB[first:last])


@pytest.mark.parametrize("bits", [4, 8])
def test_packing(bits: int) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 2**bits, (5, 64), generator=generator, dtype=torch.uint8)
    words = pack_rows(codes, bits).contiguous().view(torch.int32)
    assert words.shape == (5, 64 * bits // 32)
    assert torch.equal(unpacked(words, bits, (5, 64)), codes.long() - 2 ** (bits - 1))


# --- the checkpoint ---


@pytest.mark.parametrize(("name", "group"), [("int4", 32), ("int8", None)])
@pytest.mark.parametrize("experts_only", [False, True])
def test_a_checkpoint_holds_the_sources_tensors_with_the_errors_it_reports(
    source: Path, tmp_path: Path, name: str, group: int | None, experts_only: bool
) -> None:
    scheme = make_scheme(name, group)
    result, _ = quantize(
        source, tmp_path / "out", scheme=scheme, experts_only=experts_only, shard_bytes=40_000
    )
    before = load_file(source / "model.safetensors")
    after = dequantised(tmp_path / "out")
    assert set(after) == set(before)
    records = {record["tensor"]: record for record in result.records}
    assert set(records) == set(before)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    integers = set()
    for tensor, old in before.items():
        new, record = after[tensor], records[tensor]
        if "kept" in record:
            assert torch.equal(new, old), tensor
            continue
        integers.add(tensor)
        error = new - old.float()
        relative = float(error.norm() / old.float().norm())
        assert record["relative_rms_error"] == pytest.approx(relative, rel=1e-4)
        assert record["max_error"] == pytest.approx(float(error.abs().max()), rel=1e-5)
        assert 0 < relative < (0.11 if scheme.bits == 4 else 0.011)
        assert tensor.removesuffix(".weight") not in config["ignore"]
    wanted = {
        n for n in before
        if "_proj.weight" in n and (".experts." in n or not experts_only)
    }  # fmt: skip
    assert integers == wanted and len(integers) > 40
    rest = {n.removesuffix(".weight") for n in before if before[n].ndim == 2} - {
        n.removesuffix(".weight") for n in wanted
    }
    assert set(config["ignore"]) == rest - {"model.embed_tokens"}
    report = (tmp_path / "out" / "quantize-report.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in report] == list(result.records)


def test_files_are_aligned_without_holes_and_an_expert_is_one_range(
    source: Path, tmp_path: Path
) -> None:
    quantize(source, tmp_path / "out", shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    tensors = read_headers(tmp_path / "out")
    assert len({info.file for info in tensors.values()}) > 3
    assert index["metadata"]["total_size"] == sum(t.end - t.begin for t in tensors.values())
    assert index["weight_map"] == {name: info.file for name, info in tensors.items()}
    sizes = {"I64": 8, "I32": 4, "BF16": 2}
    assert all(info.begin % sizes[info.dtype] == 0 for info in tensors.values())
    by_file: dict[str, list[Any]] = {}
    for info in tensors.values():
        by_file.setdefault(info.file, []).append(info)
    for file, infos in by_file.items():
        infos.sort(key=lambda info: info.begin)
        assert all(a.end == b.begin for a, b in zip(infos, infos[1:], strict=False))
        assert infos[-1].end == (tmp_path / "out" / file).stat().st_size
        assert infos[-1].end < 40_000
    expert = [info for name, info in tensors.items() if ".0.mlp.experts.3." in name]
    span = max(info.end for info in expert) - min(info.begin for info in expert)
    assert len(expert) == 9 and span == sum(info.end - info.begin for info in expert)


def test_odd_sizes_move_to_the_end_of_a_file(tmp_path: Path) -> None:
    """A bias of an odd length would misplace everything behind it."""
    make_checkpoint("qwen3_moe", tmp_path / "model", dtype=torch.bfloat16,
                    moe_intermediate_size=32, num_experts=5, **WIDE)  # fmt: skip
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["mtp.a"] = torch.ones(3, dtype=torch.bfloat16)
    tensors["mtp.b"] = torch.ones(5, dtype=torch.float32)
    tensors["mtp.c"] = torch.ones(7, dtype=torch.uint8)
    tensors["mtp.d"] = torch.ones(0, dtype=torch.float32)
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    quantize(tmp_path / "model", tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(after[f"mtp.{x}"], tensors[f"mtp.{x}"]) for x in "abcd")
    sizes = {"I64": 8, "I32": 4, "F32": 4, "BF16": 2, "U8": 1}
    infos = read_headers(tmp_path / "out").values()
    assert not [info.name for info in infos if info.begin % sizes[info.dtype]]


def test_config_is_the_sources_with_llm_compressors_keys_and_other_files_come_along(
    source: Path, tmp_path: Path
) -> None:
    (source / "chat_template.jinja").write_text("x")
    (source / "LICENSE").write_text("y")
    (source / ".cache").write_text("no")
    (source / "pytorch_model.bin").write_text("no")
    quantize(source, tmp_path / "out", scheme=make_scheme("int4", 64))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    ignored = quantization.pop("ignore")
    assert "lm_head" in ignored and "model.layers.0.mlp.gate" in ignored
    weights = {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64,
        "block_structure": None, "dynamic": False, "actorder": None, "observer": "mse",
        "observer_kwargs": {},
    }  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None,
             "output_activations": None}  # fmt: skip
    assert quantization == {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "quantization_status": "compressed", "global_compression_ratio": None,
        "config_groups": {"group_0": group}, "kv_cache_scheme": None,
    }  # fmt: skip
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "LICENSE"} <= names
    assert not {".cache", "pytorch_model.bin", "config.json.tmp"} & names


# Families whose experts have no names of their own, in any checkpoint
STACKED = {"dbrx", "gpt_oss", "granitemoe"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_quantised_whole_or_refused(family: str, tmp_path: Path) -> None:
    make_model(family, tmp_path / "model", dtype=torch.bfloat16)
    if family in STACKED:
        with pytest.raises(ModelError, match=f"{family}: experts are stacked in one tensor"):
            quantize(tmp_path / "model", tmp_path / "out", scheme=make_scheme("int8", None))
        assert not (tmp_path / "out").exists()
        return
    result, said = quantize(tmp_path / "model", tmp_path / "out", scheme=make_scheme("int8", None))
    integers = [r["tensor"] for r in result.records if "kept" not in r]
    kept = [r["tensor"] for r in result.records if "kept" in r]
    assert not said
    matrices = 2 if family == "nemotron_h" else 3  # of an expert: there without a gate
    assert sum(".experts." in name for name in integers) % matrices == 0
    assert not [n for n in kept if ".experts." in n and n.endswith("weight")]
    assert not [n for n in integers if "gate.weight" in n or "norm" in n or "embed" in n]
    matrix = ("q_proj.weight", "in_proj_qkvz.weight", "q_b_proj.weight", "in_proj_z.weight")
    assert any(name.endswith(matrix) for name in integers)
    gates = ("in_proj_a.weight", "in_proj_b.weight", "in_proj_ba.weight", "conv1d.weight",
             "mixer.in_proj.weight")  # fmt: skip
    assert not any(name.endswith(gates) for name in integers)


def test_stacked_experts_are_taken_apart_where_the_family_has_names_for_them(
    tmp_path: Path,
) -> None:
    for hub_format, name in ((True, "apart"), (False, "stacked")):
        make_checkpoint("mixtral", tmp_path / name, dtype=torch.bfloat16, hub_format=hub_format,
                        **WIDE)  # fmt: skip
        quantize(tmp_path / name, tmp_path / f"{name}-out")
    assert "model.layers.0.mlp.experts.gate_up_proj" in read_headers(tmp_path / "stacked")
    found = [dequantised(tmp_path / f"{name}-out") for name in ("apart", "stacked")]
    experts = [{n: x for n, x in one.items() if ".experts." in n} for one in found]
    assert set(experts[0]) == set(experts[1]) and len(experts[0]) == 3 * 8 * 3
    assert all(torch.equal(x, experts[1][n]) for n, x in experts[0].items())


def test_delta_cases_are_among_the_families() -> None:
    assert set(DELTA_CASES) <= set(FAMILIES)


def test_rows_that_do_not_fit_groups_stay_and_are_named(tmp_path: Path) -> None:
    make_model("qwen2_moe", tmp_path / "model", dtype=torch.bfloat16, hidden_size=64,
               moe_intermediate_size=32, intermediate_size=96)  # fmt: skip
    result, said = quantize(tmp_path / "model", tmp_path / "out")
    kept = {r["tensor"]: r["kept"] for r in result.records if "kept" in r}
    name = "model.layers.1.mlp.shared_expert.down_proj.weight"  # 20 columns
    assert kept[name] == "rows of 20 are no multiple of 32" and not said
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert name.removesuffix(".weight") in ignored["ignore"]
    _, said = quantize(tmp_path / "model", tmp_path / "b", scheme=make_scheme("int4", 64))
    assert len(said) == 1 and "which vLLM does not load" in said[0] and "--group 32" in said[0]


# --- refusals ---


def test_what_cannot_be_quantised_is_refused_before_anything_is_written(
    source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="fits no expert.*rows of .*--group 32 fits all"):
        quantize(source, out, scheme=make_scheme("int4", None))
    with pytest.raises(UsageError, match="the model's own folder"):
        quantize(source, source)
    with pytest.raises(UsageError, match="model: got"):
        quantize(tmp_path / "nowhere", out)
    done = tmp_path / "done"
    quantize(source, done)
    with pytest.raises(UsageError, match="quantised already \\(compressed-tensors\\)"):
        quantize(done, out)
    rewrite_config(source, text_config={"quantization_config": {"quant_method": "fp8"}})
    with pytest.raises(UsageError, match="quantised already \\(fp8\\)"):
        quantize(source, out)
    rewrite_config(source, text_config=None, model_type="llama")
    with pytest.raises(ModelError, match="dense model"):
        quantize(source, out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "group", "text"),
    [
        ("int3", None, "format: got 'int3', allowed int4, int8"),
        ("int4", 48, "group: got 48, allowed 32, 64, 128"),
        ("int8", 0, "group: got 0"),
    ],
)
def test_wrong_formats(name: str, group: int | None, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        make_scheme(name, group)
    assert make_scheme("int4", None).group == 128 and make_scheme("int8", None).group == 0


def test_a_folder_of_others_or_of_another_command_is_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="empty or new folder"):
        quantize(source, out)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    (out / "notes.txt").unlink()
    (out / "quantize.json.tmp").write_text("{to")  # killed at the very beginning
    quantize(source, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    result, said = quantize(source, out)
    assert result.was_finished and not said and len(result.records) > 60
    with pytest.raises(UsageError, match="group: the folder has 32, now 64"):
        quantize(source, out, scheme=make_scheme("int8", 64))
    with pytest.raises(UsageError, match="experts_only: the folder has False, now True"):
        quantize(source, out, experts_only=True)
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(UsageError, match="model: the folder has '"):
        quantize(source, out)
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "quantize.json").write_text("[1]")
    with pytest.raises(UsageError, match=r"quantize\.json: not readable"):
        quantize(source, out)
    with pytest.raises(UsageError, match="got a file"):
        quantize(source, out / "config.json")


def test_too_full_a_disk_is_refused_saying_how_much_is_needed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10**6}))
    with pytest.raises(UsageError, match=r"needs 64\.\d+ MiB more.*has 977 KiB free"):
        quantize(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    quantize(source, tmp_path / "out")
    (tmp_path / "out" / "config.json").unlink()  # all but the end is there: only the rest counts
    monkeypatch.setattr(folder_module, "_SPARE_DISK", 0)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10**4}))
    quantize(source, tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 0}))
    result, _ = quantize(source, tmp_path / "out")  # finished: needs nothing
    assert result.was_finished


def test_a_weight_that_is_not_finite_is_named(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.2.mlp.experts.4.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.2\.mlp\.experts\.4\.up_proj"):
        quantize(source, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_folder_that_lost_a_file_or_is_in_use_is_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(source, out)
    (out / "config.json").unlink()
    weights = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(JobError, match=r"expected \d+ bytes or more of an earlier run, found 1000"):
        quantize(source, out)
    (out / "model.safetensors").write_bytes(weights)
    fd = folder_module._lock(out)
    try:
        with pytest.raises(JobError, match="another process"):
            quantize(source, out)
    finally:
        os.close(fd)
    report = out / "quantize-report.jsonl"
    report.write_text(report.read_text().replace("layers.1", "layers.7"))
    with pytest.raises(JobError, match="does not belong to this model"):
        quantize(source, out)


# --- the report ---


def test_experts_of_a_layer_share_a_line_with_the_worst_of_them() -> None:
    records: list[dict[str, Any]] = [
        {"tensor": "norm.weight", "kept": "why"},
        {"tensor": "q.weight", "kind": "attention q", "shape": [1, 2],
         "relative_rms_error": 0.5, "max_error": 2.0},
    ]  # fmt: skip
    for expert, error in enumerate((0.1, 0.4, 0.2)):
        records.append(
            {"tensor": f"l.0.experts.{expert}.up.weight", "kind": "experts up", "shape": [1, 2],
             "relative_rms_error": error, "max_error": error / 10}
        )  # fmt: skip
    assert list(tensor_lines(records, verbose=False)) == [
        "norm.weight: kept: why",
        "q.weight: error 0.5, largest 2",
        "l.0.experts.*.up.weight: 3 experts, error 0.2 median, 0.4 worst (expert 1), largest 0.04",
    ]
    assert len(list(tensor_lines(records, verbose=True))) == 5
    table = [line.split() for line in kind_lines(records)]
    assert table[1:] == [
        ["attention", "q", "1", "0.5", "0.5", "2"],
        ["experts", "up", "3", "0.2", "0.4", "0.04"],
    ]
