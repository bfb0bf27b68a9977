"""DeepSeek-V3.2 and GLM-5: DeepSeek-V3's blocks, whose attention sees `index_topk` positions that
an indexer chooses. Up to that many it sees all, and is DeepSeek-V3's: so far they run."""

from dataclasses import replace

from windlass.errors import ModelError
from windlass.models.config import Config
from windlass.models.families.deepseek_v3 import latent_model
from windlass.models.names import NameMap
from windlass.models.spec import ModelSpec

_KINDS = ("indexed_attention", "deepseek_sparse_attention")


def read(config: Config) -> tuple[ModelSpec, NameMap]:
    # the indexer's own settings: it chooses all there is
    config.ignore(*(key for key in config.raw if key.startswith("index")))
    most = config.size("index_topk")
    config.one_of("rope_interleave", (True,), default=True)
    for kind in config.items("layer_types", str):
        if kind not in _KINDS:
            raise ModelError(
                f"{config.where}: layer_types has {kind!r}, allowed {', '.join(_KINDS)}"
            )
    spec, names = latent_model(config, num_dense=3, scale=2.5)
    if most < spec.max_positions:
        spec = replace(
            spec,
            max_positions=most,
            limited_by=f"up to which its sparse attention (index_topk {most}) sees all positions:"
            " its indexer is not computed",
        )
    return spec, replace(names, unused=(r"\.self_attn\.indexer\.",))
