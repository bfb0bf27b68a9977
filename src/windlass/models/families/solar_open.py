"""Solar Open."""

from windlass.models.config import Config
from windlass.models.families.common import deepseek_moe, gqa, layers, model, sigmoid_topk
from windlass.models.families.tensor_names import qwen_names
from windlass.models.names import NameMap
from windlass.models.spec import Block, ModelSpec


def read(config: Config) -> tuple[ModelSpec, NameMap]:
    config.one_of("scoring_func", ("sigmoid",), default="sigmoid")
    config.one_of("first_k_dense_replace", (0,), default=0)
    config.one_of("use_qk_norm", (False,), default=False)
    config.ignore("intermediate_size")  # of dense layers, which there are none of
    attention = gqa(config, theta=1e6, qkv_bias=config.get("attention_bias", bool, False))
    experts = deepseek_moe(config, sigmoid_topk(config, renorm=True))
    spec = model(config, [Block(attention=attention, ffn=experts) for _ in layers(config)])
    return spec, qwen_names(spec)
