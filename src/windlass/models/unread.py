"""Settings of config.json that nobody asked for: known to change nothing, refused, or named. Knows
keys and values, no family."""

import json
import re
from collections.abc import Mapping
from typing import Any

from windlass.errors import ModelError
from windlass.models.config import Config

# Change nothing that a text model computes when it runs.
_HARMLESS = frozenset(
    # where a file comes from and which program reads it
    "architectures auto_map base_model_ep_plan base_model_pp_plan base_model_tp_plan dtype "
    "model_type tokenizer_class torch_dtype torchscript transformers_version unsloth_fixed "
    "unsloth_version use_bfloat16 use_cache "
    # how a computation is cut up
    "chunk_size_feed_forward ep_size pretraining_tp tensor_parallel_degree use_flash_attention "
    # training
    "gradient_checkpointing init_std is_decoder seq_aux "
    # what other kinds of model answer
    "cross_attention_hidden_size finetuning_task id2label label2id prefix problem_type "
    "remove_invalid_values return_dict return_dict_in_generate task_specific_params "
    "tie_encoder_decoder "
    # how a text is drawn: generation_config.json says it
    "bad_words_ids diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size "
    "exponential_decay_length_penalty length_penalty max_length min_length no_repeat_ngram_size "
    "num_beam_groups num_beams num_return_sequences repetition_penalty suppress_tokens "
    "begin_suppress_tokens temperature top_k top_p typical_p "
    # multi-token prediction
    "num_mtp_modules num_nextn_predict_layers use_mtp "
    # images and sound, and the position axes that are equal for text
    "ignore_index mrope_interleaved mrope_section "
    # written by some conversion of rotary settings
    "finetuned "
    # the type of a state that is always float32 here
    "mamba_ssm_dtype".split()
)
_HARMLESS_KINDS = re.compile(
    r"_.*|.*dropout.*|.*_pdrop|.*jitter.*|.*_loss(_.*)?|initializer_.*|mtp_.*"
    r"|output_(attentions|hidden_states|router_logits|scores)|.*_token_(ids?|index)"
    r"|(use_.*)?vision_.*|.*projector.*|(audio|image|mm|video)_.*"
)

# Settings that change the mathematics of some architecture, and the values with which they do not.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "alibi": (False,),
    "attention_bias": (False,),
    "attention_chunk_size": (),
    "attention_multiplier": (1.0,),
    "attn_logit_softcapping": (0.0,),
    "attn_output_gate": (False,),
    "clip_qkv": (),
    "compression_ratio": (1.0,),
    "embedding_multiplier": (1.0,),
    "final_logit_softcapping": (0.0,),
    "index_topk": (),
    "is_encoder_decoder": (False,),
    "layer_types": (),
    "lm_head_bias": (False,),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "mlp_bias": (False,),
    "mlp_only_layers": ([],),
    "moe_latent_size": (),
    "n_group": (0, 1),
    "n_shared_experts": (0,),
    "num_shared_experts": (0,),
    "partial_rotary_factor": (1.0,),
    "pruned_heads": ({},),
    "qk_layernorm": (False,),
    "qkv_bias": (False,),
    "residual_multiplier": (1.0,),
    "rotary_dim": (),
    "routed_scaling_factor": (1.0,),
    "scoring_func": (),
    "shared_expert_intermediate_size": (0,),
    "shared_intermediate_size": (0,),
    "sliding_window": (0,),
    "uniform_expert_assignment": (False,),
    "use_bias": (False,),
    "use_qk_norm": (False,),
    "use_sliding_window": (False,),
}
_SHOWN = 60  # characters of a value


def unknown_settings(config: Config, family: str) -> tuple[str, ...]:
    """Of what nobody has read in `config` and its sections, everything that is not known to change
    nothing, as "section: key = value". Raises ModelError for a setting that changes the
    mathematics of some architecture and has such a value."""
    found = []
    for part in config.with_sections():
        for key in part.unread():
            value = part.raw[key]
            if key in _NEUTRAL:
                _check_neutral(part, key, value, family)
            elif key not in _HARMLESS and not _HARMLESS_KINDS.fullmatch(key):
                text = json.dumps(value)
                shown = text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
                within = part.where.removeprefix(config.where).removeprefix(": ")
                found.append(f"{within + ': ' if within else ''}{key} = {shown}")
    return tuple(found)


def _check_neutral(part: Config, key: str, value: Any, family: str) -> None:
    neutral = _NEUTRAL[key]
    if value not in neutral:
        allowed = " or ".join(repr(one) for one in (*neutral, None)).replace("None", "null")
        raise ModelError(f"{part.where}: {key} is {value!r}, allowed {allowed} for {family}")
