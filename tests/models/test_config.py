"""Reading config.json: strictness, what is refused, and sizes of published models."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from layouts import expected_tensors
from published import PUBLISHED, SMALL_QWEN3_5
from quantised_cases import FP8
from windlass.build.checkpoint_sizes import cache_shapes
from windlass.errors import ModelError
from windlass.kvcache.kv_cache import bytes_per_token, state_bytes
from windlass.models.config import Config
from windlass.models.known_types import DENSE, MOE
from windlass.models.registry import FAMILIES, read_description, read_spec
from windlass.models.spec import Gqa, LongRopeScaling, Moe
from windlass.perf import flops as cost

_PARTIAL = {"partial_rotary_factor": 0.5}


def published(model_type: str, **changes: Any) -> dict[str, Any]:
    config = {"model_type": model_type, **PUBLISHED[model_type][0], **changes}
    return {key: value for key, value in config.items() if value != "remove"}


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(ModelError) as caught:
        read_spec(config)
    return str(caught.value)


# --- the reader -----------------------------------------------------------------------------------


def test_null_reads_like_absence() -> None:
    config = Config({"a": None})
    assert config.get("a", int, 3) == 3 and config.optional("a", int) is None
    with pytest.raises(ModelError, match="a is missing, allowed an integer"):
        config.require("a", int)


@pytest.mark.parametrize(
    ("value", "kind"),
    [("7", int), (7.0, int), (True, int), (True, float), ("1e4", float), (1, bool), (3, str),
     ([1], dict), ({}, list)],
)  # fmt: skip
def test_types_are_strict(value: Any, kind: type) -> None:
    with pytest.raises(ModelError, match=r"config\.json: a is .*, allowed"):
        Config({"a": value}).require("a", kind)


def test_a_number_may_be_written_as_an_integer() -> None:
    value = Config({"a": 10000}).require("a", float)
    assert value == 1e4 and isinstance(value, float)


def test_spellings_must_agree() -> None:
    assert Config({"a": 4, "b": 4}).first(("a", "b"), int) == 4
    with pytest.raises(ModelError, match="a = 4, b = 5"):
        Config({"a": 4, "b": 5}).first(("a", "b"), int)
    with pytest.raises(ModelError, match="a or b is missing"):
        Config({}).first(("a", "b"), int)


@pytest.mark.parametrize("value", [0, -1])
def test_sizes_are_positive(value: int) -> None:
    with pytest.raises(ModelError, match="allowed a positive integer"):
        Config({"a": value}).size("a")


def test_one_of_tells_true_from_one() -> None:
    assert Config({}).one_of("a", (1, 2), default=2) == 2
    with pytest.raises(ModelError, match="a is True, allowed 1, 2"):
        Config({"a": True}).one_of("a", (1, 2), default=2)


def test_elements_and_sections_name_their_place() -> None:
    config = Config({"a": {"b": [1, "x"]}})
    with pytest.raises(ModelError, match=r"config\.json: a: b\[1\] is 'x'"):
        config.section("a").items("b", int)


def test_unread_keys() -> None:
    config = Config({"a": 1, "b": 2, "c": None})
    config.get("a", int, 0)
    assert config.unread() == ["b"]


def test_unread_keys_of_sections() -> None:
    config = Config({"a": {"b": 1, "c": {"d": 2}}, "e": 3, "f": 4})
    config.section("a").get("b", int, 0)
    config.section("a").section("c")
    config.ignore("e")
    assert [(part.where, part.unread()) for part in config.with_sections()] == [
        ("config.json", ["f"]), ("config.json: a", []), ("config.json: a: c", ["d"]),
    ]  # fmt: skip


# --- the registry ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("qwen3_moee", "qwen3_moe"), ("Mixtral", "mixtral"), ("qwen3moe", "qwen3_moe"),
     ("deepseekv3", "deepseek_v3"), ("gpt-oss", "gpt_oss")],
)  # fmt: skip
def test_a_misspelt_model_type_suggests_the_one_that_was_meant(typed: str, meant: str) -> None:
    message = refusal({"model_type": typed})
    assert f"did you mean {meant}?" in message and "mixtral" in message


# Nobody can be told to take one of ours for them; deepseek_v9 and qwen9_moe do not exist yet.
OTHERS = ["deepseek_v4", "deepseek_v9", "qwen9_moe", "qwen3_omni_moe", "glm4v_moe", "jamba",
          "longcat_flash", "minimax_m3_vl", "granitemoehybrid", "switch_transformers"]  # fmt: skip


@pytest.mark.parametrize("model_type", OTHERS)
def test_another_model_type_is_no_slip_of_the_pen(model_type: str) -> None:
    message = refusal({"model_type": model_type})
    assert "did you mean" not in message and repr(model_type) in message
    assert ("not supported yet" in message) == ("9" not in model_type)


def test_the_type_inside_a_multimodal_file_is_told_too() -> None:
    config = {"model_type": "llava", "text_config": {"model_type": "jamba"}}
    assert "'llava' with the text model 'jamba', which is not supported yet" in refusal(config)


@pytest.mark.parametrize(
    "model_type",
    ["llama", "qwen3", "mistral", "gemma2", "qwen2_vl", "qwen3_vl", "gemma3", "llava", "mistral3",
     "mllama", "internvl", "glm4v", "bert"],
)  # fmt: skip
def test_dense_models_have_no_experts(model_type: str) -> None:
    assert "dense model without experts" in refusal({"model_type": model_type})


def test_no_model_type_is_both_dense_and_not() -> None:
    assert not DENSE & MOE and not DENSE & set(FAMILIES)


def test_model_type_is_needed() -> None:
    assert "model_type is missing" in refusal({})


def test_text_config_inside_a_multimodal_file() -> None:
    inner = published("mixtral")
    spec, names = read_spec({"model_type": "some_vl", "text_config": inner})
    assert (spec, names) == read_spec(inner)


@pytest.mark.parametrize(
    ("outer", "inner", "tied"),
    [(True, None, True), (None, True, True), (False, True, True), (True, False, True),
     (False, False, False), (None, None, False)],
)  # fmt: skip
@pytest.mark.parametrize("model_type", ["some_vl", "qwen3_5_moe"])
def test_either_flag_ties_the_head_of_a_nested_model(
    model_type: str, outer: bool | None, inner: bool | None, tied: bool
) -> None:
    text = published("qwen3_moe") if model_type == "some_vl" else SMALL_QWEN3_5
    config = {"model_type": model_type, "text_config": {**text, "tie_word_embeddings": inner}}
    spec, _ = read_spec({**config, "tie_word_embeddings": outer})
    assert spec.tied_head == tied


# --- what nobody reads ----------------------------------------------------------------------------

# What other programs and other kinds of model keep in a config.json
HARMLESS: dict[str, Any] = {
    "_name_or_path": "x", "_attn_implementation": "eager", "architectures": ["A"],
    "attention_dropout": 0.1, "attn_pdrop": 0.1, "audio_config": {"a": 1}, "audio_token_id": 1,
    "auto_map": {"AutoConfig": "x.y"}, "aux_loss_alpha": 0.001, "bos_token_id": 1,
    "chunk_size_feed_forward": 0, "decoder_start_token_id": 2, "do_sample": False, "dtype": "x",
    "eos_token_id": [1, None], "ep_size": 8, "id2label": {"0": "A"}, "ignore_index": -100,
    "image_token_index": 5, "initializer_range": 0.02, "is_decoder": False,
    "is_encoder_decoder": False, "max_length": 20, "mm_hidden_size": 7, "mtp_num_hidden_layers": 1,
    "num_nextn_predict_layers": 1, "output_router_logits": True, "pretraining_tp": 2,
    "projector_hidden_act": "gelu", "pruned_heads": {}, "repetition_penalty": 1.1,
    "router_aux_loss_coef": 0.001, "seq_aux": True, "tf_legacy_loss": False, "top_k": 50,
    "torch_dtype": "bfloat16", "transformers_version": "5.0", "use_cache": True,
    "use_unified_vision_chunk": True, "video_placeholder": "<v>", "vision_config": {"depth": 27},
}  # fmt: skip


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_what_is_known_to_change_nothing_is_not_told(model_type: str) -> None:
    found = read_description({**HARMLESS, **published(model_type)})
    assert found.unknown == () and found.notes == ()


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (published("mixtral", ngate_scale=2.0), "ngate_scale = 2.0"),
        (published("mixtral", norm_after="attention"), 'norm_after = "attention"'),
        (published("mixtral", rope_scaling={"rope_type": "default", "factor": 4.0}),
         "rope_scaling: factor = 4.0"),
        (published("mixtral", rope_scaling={"type": "linear", "factor": 4.0},
                   rope_parameters={"rope_type": "linear", "factor": 2.0}),
         'rope_parameters = {"rope_type": "linear", "factor": 2.0}'),
        ({"model_type": "some_vl", "text_config": published("qwen3_moe", zero_experts=3)},
         "text_config: zero_experts = 3"),
        ({"model_type": "some_vl", "text_config": published("qwen3_moe"), "zero_experts": 3},
         "zero_experts = 3"),
        ({"model_type": "qwen3_5_moe", "text_config": dict(SMALL_QWEN3_5, zero_experts=3)},
         "text_config: zero_experts = 3"),
        (published("dbrx", attn_config={"kv_n_heads": 8, "rope_theta": 500000, "sinks": 4}),
         "attn_config: sinks = 4"),
        (published("dbrx", ffn_config={**PUBLISHED["dbrx"][0]["ffn_config"], "moe_bias": True}),
         "ffn_config: moe_bias = true"),
        (published("mixtral", table=list(range(1000))),
         "table = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 1..."),
    ],
    ids=lambda value: value.partition(" = ")[0] if isinstance(value, str) else "",
)  # fmt: skip
def test_a_setting_that_nobody_knows_is_told(config: dict[str, Any], told: str) -> None:
    found = read_description(config)
    assert found.unknown == (told,)
    assert found.notes == (f"config.json: not known, not read: {told}",)


def test_unknown_settings_are_told_in_one_line() -> None:
    found = read_description(published("mixtral", a=1, b=None, c=[]))
    assert found.notes == ("config.json: not known, not read: a = 1, c = []",)


@pytest.mark.parametrize(
    "config",
    [{"model_type": "qwen3_5_moe", "text_config": {"final_logit_softcapping": 30.0}},
     {"model_type": "qwen3_5_moe", "text_config": {"mlp_only_layers": [0]}},
     {"model_type": "qwen3_5_moe", "text_config": {"attn_output_gate": False}},
     {"model_type": "qwen3_5_moe", "text_config": {}, "final_logit_softcapping": 30.0}],
)  # fmt: skip
def test_settings_are_refused_wherever_they_stand(config: dict[str, Any]) -> None:
    assert "allowed" in refusal({**config, "text_config": SMALL_QWEN3_5 | config["text_config"]})


def test_qk_norm_of_qwen3_may_be_said() -> None:
    # as Qwen3-Coder says it
    said = read_spec(published("qwen3_moe", use_qk_norm=True, shared_expert_intermediate_size=0))
    assert said == read_spec(published("qwen3_moe"))
    assert "use_qk_norm" in refusal(published("qwen3_moe", use_qk_norm=False))


AROUND = {"qwen3_vl_moe": "qwen3_vl_moe_text", "kimi_k25": "kimi_k2"}


@pytest.mark.parametrize("model_type", AROUND)
def test_image_and_text_types_are_read_by_their_text(model_type: str) -> None:
    inner = published(AROUND[model_type])
    outer = {"model_type": model_type, "text_config": inner, "tie_word_embeddings": True}
    spec, names = read_spec(outer)
    assert spec == replace(read_spec(inner)[0], family=model_type, tied_head=True)
    assert names.quantization is None
    settings = {**FP8, "modules_to_not_convert": ["lm_head"]}
    _, names = read_spec({**outer, "text_config": {**inner, "quantization_config": settings}})
    assert names.quantization is not None
    inner |= {"final_logit_softcapping": 30.0}
    assert "text_config: final_logit_softcapping" in refusal({**outer, "text_config": inner})


def test_kimi_k2_is_deepseek_v3_under_another_name() -> None:
    config = published("kimi_k2")
    spec, names = read_spec({**config, "model_type": "deepseek_v3"})
    assert read_spec(config) == (replace(spec, family="kimi_k2"), names)


def test_layers_without_experts_where_only_a_list_says_so() -> None:
    one = published("glm4_moe_lite", first_k_dense_replace=None)
    assert read_spec(one) == read_spec(published("glm4_moe_lite", mlp_layer_types=None))
    kinds = ["sparse", "dense", *["sparse"] * 45]
    spec, _ = read_spec({**one, "mlp_layer_types": kinds})
    assert [isinstance(block.ffn, Moe) for block in spec.blocks[:3]] == [True, False, True]


@pytest.mark.parametrize("most", [2048, 163840])
def test_sparse_attention_limits_positions(most: int) -> None:
    spec, names = read_spec(published("deepseek_v32", index_topk=most))
    whole, others = read_spec({**published("deepseek_v3"), "num_nextn_predict_layers": 1})
    assert spec.blocks == whole.blocks and names == replace(others, unused=names.unused)
    assert spec.max_positions == most
    lines = [f"deepseek_v32: at most {most} tokens, up to which its sparse attention"
             f" (index_topk {most}) sees all positions: its indexer is not computed"]  # fmt: skip
    assert list(spec.limits()) == (lines if most < 163840 else [])


def test_full_attention_of_exaone_has_no_positions_where_others_slide() -> None:
    spec, _ = read_spec(published("exaone_moe"))
    found = [(b.attention.window, b.attention.rope is None)
             for b in spec.blocks if isinstance(b.attention, Gqa)]  # fmt: skip
    assert found == [*[(128, False)] * 3, (None, True)] * 12
    whole, _ = read_spec(published("exaone_moe", sliding_window=None, layer_types=None))
    assert all(isinstance(b.attention, Gqa) and b.attention.rope for b in whole.blocks)


@pytest.mark.parametrize("model_type", [name for name in PUBLISHED if name != "dbrx"])
@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "gelu"},
        {"rms_norm_eps": "remove", "norm_eps": "remove", "layer_norm_epsilon": "remove"},
        {"vocab_size": "remove"},
        {"num_experts_per_tok": 10_000, "experts_per_token": "remove"},
        {"num_hidden_layers": 0},
        {"final_logit_softcapping": 30.0},
        {"attn_logit_softcapping": 50.0},
        {"index_topk": 0},
        {"partial_rotary_factor": 0.3},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_settings_that_are_not_supported(model_type: str, change: dict[str, Any]) -> None:
    if model_type == "gemma4_text" and "final_logit_softcapping" in change:
        change = {"final_logit_softcapping": -1.0}  # it is the one that has it
    message = refusal(published(model_type, **change))
    assert "allowed" in message or "missing" in message


@pytest.mark.parametrize(
    ("model_type", "change"),
    [
        ("mixtral", {"attention_bias": True}),
        ("mixtral", {"use_qk_norm": True}),
        ("mixtral", {"num_key_value_heads": 5}),
        ("mixtral", {"sliding_window": -1}),
        ("mixtral", {"n_shared_experts": 1}),
        ("mixtral", {"routed_scaling_factor": 2.0}),
        ("mixtral", {"layer_types": ["full_attention"] * 32}),
        ("qwen2_moe", {"layer_types": ["full_attention"]}),
        ("qwen2_moe", {"layer_types": ["linear_attention"] * 24}),
        ("qwen2_moe", {"layer_types": ["sliding_attention"] * 24}),
        ("olmoe", {"sliding_window": 128}),
        ("olmoe", {"clip_qkv": -1.0}),
        ("deepseek_v2", {"norm_topk_prob": True}),
        ("deepseek_v2", {"topk_method": "noaux_tc"}),
        ("deepseek_v2", {"scoring_func": "sigmoid"}),
        ("deepseek_v2", {"moe_layer_freq": 2}),
        ("deepseek_v3", {"first_k_dense_replace": 61}),
        ("deepseek_v3", {"n_group": 7}),
        ("deepseek_v3", {"n_group": 256}),
        ("deepseek_v3", {"topk_group": 9}),
        ("deepseek_v3", {"topk_group": 1, "num_experts_per_tok": 33}),
        ("deepseek_v3", {"topk_method": "greedy"}),
        ("deepseek_v3", {"scoring_func": "softmax"}),
        ("gpt_oss", {"experts_per_token": 5}),
        ("gpt_oss", {"sliding_window": None}),
        ("gemma4_text", {"enable_moe_block": False}),
        ("gemma4_text", {"hidden_activation": "silu"}),
        ("gemma4_text", {"hidden_size_per_layer_input": 256}),
        ("gemma4_text", {"hidden_size_per_layer_input": "remove"}),  # then it is 256
        ("gemma4_text", {"num_kv_shared_layers": 10}),
        ("gemma4_text", {"use_bidirectional_attention": "all"}),
        ("gemma4_text", {"layer_types": ["sliding_attention"] * 30}),
        ("gemma4_text", {"num_global_key_value_heads": 5}),
        ("gemma4_text", {"per_layer_config": {"30": {"head_dim": 512}}}),
        ("gemma4_text", {"per_layer_config": {"5": {"num_attention_heads": 8}}}),
        ("gemma4_text", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}),
        ("granitemoe", {"logits_scaling": 0}),
        ("lfm2_moe", {"layer_types": None}),
        ("lfm2_moe", {"layer_types": ["conv"] * 23 + ["short_conv"]}),
        ("lfm2_moe", {"tie_word_embeddings": False}),
        ("granitemoe", {"shared_intermediate_size": 512}),
        ("nemotron_h", {"hybrid_override_pattern": "ME" * 25 + "M|"}),
        ("nemotron_h", {"hybrid_override_pattern": "ME*"}),
        ("nemotron_h", {"layers_block_type": ["mamba", "moe"] * 25 + ["moe", "conv"]}),
        ("nemotron_h", {"hybrid_override_pattern": "M-" * 26}),  # no experts
        ("nemotron_h", {"layers_block_type": ["mamba", "moe"] * 26}),  # the pattern says another
        ("nemotron_h", {"moe_latent_size": 1024}),
        ("nemotron_h", {"n_groups": 7}),
        ("nemotron_h", {"n_shared_experts": 2}),
        ("nemotron_h", {"time_step_limit": [0.001, float("inf")]}),
        ("nemotron_h", {"use_bias": True}),
        ("phimoe", {"num_experts_per_tok": 3}),
        ("mixtral", {"index_topk": 2048}),
        ("deepseek_v32", {"index_topk": "remove"}),
        ("deepseek_v32", {"rope_interleave": False}),
        ("deepseek_v32", {"layer_types": ["full_attention"] * 61}),
        ("glm4_moe_lite", {"mlp_layer_types": ["sparse"] * 47}),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense"]}),
        ("glm4_moe_lite", {"mlp_layer_types": ["none"] * 47, "first_k_dense_replace": None}),
        ("glm4_moe_lite", {"qk_head_dim": 192}),
        ("qwen3_vl_moe_text", {"norm_topk_prob": False}),
        ("qwen3_vl_moe_text", {"moe_intermediate_size": 1024}),
        ("hy_v3", {"route_norm": False}),
        ("hy_v3", {"expert_hidden_dim": 768}),
        ("solar_open", {"first_k_dense_replace": 1}),
        ("solar_open", {"use_qk_norm": True}),
        ("exaone_moe", {"is_moe_layer": [True] * 48}),
        ("exaone_moe", {"layer_types": None}),
        ("mellum", {"rope_parameters": {"full_attention": {}, "sliding_attention": _PARTIAL}}),
        ("dbrx", {"tie_word_embeddings": True}),
        ("dbrx", {"rope_theta": 10000.0}),
        ("dbrx", {"n_heads": 7}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_settings_that_a_family_refuses(model_type: str, change: dict[str, Any]) -> None:
    assert "allowed" in refusal(published(model_type, **change))


@pytest.mark.parametrize(
    "change",
    [{"ffn_act_fn": {"name": "gelu"}}, {"moe_normalize_expert_weights": 3.0}, {"moe_top_k": 17},
     {"moe_num_experts": "remove"}],
)  # fmt: skip
def test_nested_settings_of_dbrx(change: dict[str, Any]) -> None:
    nested = {**PUBLISHED["dbrx"][0]["ffn_config"], **change}
    nested = {key: value for key, value in nested.items() if value != "remove"}
    assert "ffn_config" in refusal(published("dbrx", ffn_config=nested))


def test_an_empty_rope_scaling_says_nothing() -> None:
    rope = {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}
    config = published("mixtral", rope_theta=None, rope_parameters=rope)
    alone, beside = read_description(config), read_description({**config, "rope_scaling": {}})
    assert alone == beside and alone.unknown == ()


def test_layer_types_decide_the_windows() -> None:
    kinds = ["full_attention"] * 23 + ["sliding_attention"]
    config = published("qwen2_moe", use_sliding_window=True, sliding_window=77, layer_types=kinds)
    spec, _ = read_spec(config)
    found = [b.attention.window for b in spec.blocks if isinstance(b.attention, Gqa)]
    assert found == [None] * 23 + [77]


def test_factors_of_long_contexts() -> None:
    scaling = dict(
        type="longrope", short_factor=[1.0] * 64, long_factor=[2.0] * 64, short_mscale=1.2,
        long_mscale=1.3, original_max_position_embeddings=4096,
    )  # fmt: skip
    spec, _ = read_spec(published("phimoe", rope_scaling=scaling))
    attention = spec.blocks[0].attention
    assert isinstance(attention, Gqa) and attention.rope is not None
    assert isinstance(attention.rope.scaling, LongRopeScaling)


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_published_parameter_counts(model_type: str) -> None:
    spec, _ = read_spec(published(model_type))
    assert cost.num_parameters(spec) == PUBLISHED[model_type][1]
    keys = ("layer_types", "mlp_layer_types", "is_moe_layer", "hybrid_override_pattern")
    listed = {key: PUBLISHED[model_type][0].get(key, "") for key in keys}
    kinds = {key: kinds[:3] + kinds[-1:] or None for key, kinds in listed.items()}
    small = read_spec(published(model_type, num_hidden_layers=4, n_layers=4, **kinds))
    elements = sum(_elements(shape) for shape in expected_tensors(*small).values())
    assert elements == cost.num_parameters(small[0])


def _elements(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


@pytest.mark.parametrize(
    ("model_type", "num_bytes"),
    [("mixtral", 128 * 1024), ("deepseek_v3", 2 * 61 * 576),
     ("gemma4_text", 2 * (25 * 2 * 8 * 256 + 5 * 2 * 2 * 512))],
)  # fmt: skip
def test_cache_of_a_token(model_type: str, num_bytes: int) -> None:
    spec, _ = read_spec(published(model_type))
    assert bytes_per_token(cache_shapes(spec), torch.bfloat16) == num_bytes
    assert state_bytes(cache_shapes(spec)) == 0


def test_a_state_in_place_of_a_cache() -> None:
    lfm2, nemotron = (read_spec(published(name))[0] for name in ("lfm2_moe", "nemotron_h"))
    for spec, attention, state in (
        (lfm2, 6 * 2 * 8 * 64, 18 * 2 * 2048),
        (nemotron, 6 * 2 * 2 * 128, 23 * (3 * 6144 + 64 * 64 * 128)),
    ):
        assert bytes_per_token(cache_shapes(spec), torch.bfloat16) == 2 * attention
        assert state_bytes(cache_shapes(spec)) == 4 * state


def test_operations() -> None:
    mixtral, _ = read_spec(published("mixtral"))
    # every weight of a matrix is one multiplication and one addition
    flops = sum(cost.block_flops_per_token(mixtral, i) for i in range(32))
    flops += cost.head_flops_per_token(mixtral)
    assert flops == pytest.approx(2 * 12.75e9, rel=1e-3)
    seen = cost.block_flops_per_token(mixtral, 0, context=1000)
    assert seen - cost.block_flops_per_token(mixtral, 0) == 4 * 1000 * 4096
    windowed, _ = read_spec(published("gpt_oss"))
    assert cost.block_flops_per_token(windowed, 0, context=500) == cost.block_flops_per_token(
        windowed, 0, context=128
    )


def test_every_family_has_its_name() -> None:
    assert set(PUBLISHED) <= set(FAMILIES) and len(FAMILIES) >= 16
    for model_type in PUBLISHED:
        spec, _ = read_spec(published(model_type))
        assert spec.family == model_type
        assert any(isinstance(block.ffn, Moe) for block in spec.blocks)
