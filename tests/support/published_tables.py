"""Names and shapes of tensors of published checkpoints, as their headers have them: of the first
two layers, and of what a language model leaves unread (some of it; a layer for multi-token
prediction, the 48th there, is the third here). `{a-b}` is a range."""

GLM_4_7_FLASH = """
lm_head.weight 154880,2048
model.embed_tokens.weight 154880,2048
model.layers.{0-1}.input_layernorm.weight 2048
model.layers.{0-1}.post_attention_layernorm.weight 2048
model.layers.{0-1}.self_attn.kv_a_layernorm.weight 512
model.layers.{0-1}.self_attn.kv_a_proj_with_mqa.weight 576,2048
model.layers.{0-1}.self_attn.kv_b_proj.weight 8960,512
model.layers.{0-1}.self_attn.o_proj.weight 2048,5120
model.layers.{0-1}.self_attn.q_a_layernorm.weight 768
model.layers.{0-1}.self_attn.q_a_proj.weight 768,2048
model.layers.{0-1}.self_attn.q_b_proj.weight 5120,768
model.layers.0.mlp.down_proj.weight 2048,10240
model.layers.0.mlp.gate_proj.weight 10240,2048
model.layers.0.mlp.up_proj.weight 10240,2048
model.layers.1.mlp.experts.{0-63}.down_proj.weight 2048,1536
model.layers.1.mlp.experts.{0-63}.gate_proj.weight 1536,2048
model.layers.1.mlp.experts.{0-63}.up_proj.weight 1536,2048
model.layers.1.mlp.gate.e_score_correction_bias 64
model.layers.1.mlp.gate.weight 64,2048
model.layers.1.mlp.shared_experts.down_proj.weight 2048,1536
model.layers.1.mlp.shared_experts.gate_proj.weight 1536,2048
model.layers.1.mlp.shared_experts.up_proj.weight 1536,2048
model.norm.weight 2048
"""
GLM_4_7_FLASH_UNREAD = """
model.layers.2.eh_proj.weight 2048,4096
model.layers.2.embed_tokens.weight 154880,2048
model.layers.2.enorm.weight 2048
model.layers.2.hnorm.weight 2048
model.layers.2.mlp.experts.{0-63}.down_proj.weight 2048,1536
model.layers.2.shared_head.head.weight 154880,2048
model.layers.2.shared_head.norm.weight 2048
"""
GLM_4_7_FLASH_NEXTN = """
model.layers.2.eh_proj.weight 2048,4096
model.layers.2.embed_tokens.weight 154880,2048
model.layers.2.enorm.weight 2048
model.layers.2.hnorm.weight 2048
model.layers.2.input_layernorm.weight 2048
model.layers.2.mlp.experts.{0-63}.down_proj.weight 2048,1536
model.layers.2.mlp.experts.{0-63}.gate_proj.weight 1536,2048
model.layers.2.mlp.experts.{0-63}.up_proj.weight 1536,2048
model.layers.2.mlp.gate.e_score_correction_bias 64
model.layers.2.mlp.gate.weight 64,2048
model.layers.2.mlp.shared_experts.down_proj.weight 2048,1536
model.layers.2.mlp.shared_experts.gate_proj.weight 1536,2048
model.layers.2.mlp.shared_experts.up_proj.weight 1536,2048
model.layers.2.post_attention_layernorm.weight 2048
model.layers.2.self_attn.kv_a_layernorm.weight 512
model.layers.2.self_attn.kv_a_proj_with_mqa.weight 576,2048
model.layers.2.self_attn.kv_b_proj.weight 8960,512
model.layers.2.self_attn.o_proj.weight 2048,5120
model.layers.2.self_attn.q_a_layernorm.weight 768
model.layers.2.self_attn.q_a_proj.weight 768,2048
model.layers.2.self_attn.q_b_proj.weight 5120,768
model.layers.2.shared_head.head.weight 154880,2048
model.layers.2.shared_head.norm.weight 2048
"""
KIMI_K2_5 = """
language_model.lm_head.weight 163840,7168
language_model.model.embed_tokens.weight 163840,7168
language_model.model.layers.{0-1}.input_layernorm.weight 7168
language_model.model.layers.{0-1}.post_attention_layernorm.weight 7168
language_model.model.layers.{0-1}.self_attn.kv_a_layernorm.weight 512
language_model.model.layers.{0-1}.self_attn.kv_a_proj_with_mqa.weight 576,7168
language_model.model.layers.{0-1}.self_attn.kv_b_proj.weight 16384,512
language_model.model.layers.{0-1}.self_attn.o_proj.weight 7168,8192
language_model.model.layers.{0-1}.self_attn.q_a_layernorm.weight 1536
language_model.model.layers.{0-1}.self_attn.q_a_proj.weight 1536,7168
language_model.model.layers.{0-1}.self_attn.q_b_proj.weight 12288,1536
language_model.model.layers.0.mlp.down_proj.weight 7168,18432
language_model.model.layers.0.mlp.gate_proj.weight 18432,7168
language_model.model.layers.0.mlp.up_proj.weight 18432,7168
language_model.model.layers.1.mlp.experts.{0-383}.down_proj.weight_packed 7168,256
language_model.model.layers.1.mlp.experts.{0-383}.down_proj.weight_scale 7168,64
language_model.model.layers.1.mlp.experts.{0-383}.gate_proj.weight_packed 2048,896
language_model.model.layers.1.mlp.experts.{0-383}.gate_proj.weight_scale 2048,224
language_model.model.layers.1.mlp.experts.{0-383}.up_proj.weight_packed 2048,896
language_model.model.layers.1.mlp.experts.{0-383}.up_proj.weight_scale 2048,224
language_model.model.layers.1.mlp.gate.e_score_correction_bias 384
language_model.model.layers.1.mlp.gate.weight 384,7168
language_model.model.layers.1.mlp.shared_experts.down_proj.weight 7168,2048
language_model.model.layers.1.mlp.shared_experts.gate_proj.weight 2048,7168
language_model.model.layers.1.mlp.shared_experts.up_proj.weight 2048,7168
language_model.model.norm.weight 7168
"""
KIMI_K2_5_UNREAD = """
language_model.model.layers.1.mlp.experts.{0-383}.down_proj.weight_shape 2
language_model.model.layers.1.mlp.experts.{0-383}.gate_proj.weight_shape 2
language_model.model.layers.1.mlp.experts.{0-383}.up_proj.weight_shape 2
mm_projector.pre_norm.weight 1152
mm_projector.proj.2.weight 7168,4608
vision_tower.encoder.blocks.{0-26}.wqkv.weight 3456,1152
vision_tower.patch_embed.pos_emb.weight 64,64,1152
"""
