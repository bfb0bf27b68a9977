"""Trains a larger model than the demo model out of it: more layers and experts, for bench/.

`python demo/larger.py --minutes 27`, after data.py. Attention, norms and embedding start as those
of the demo model, each of its layers twice; routers and experts start from nothing. One process of
one thread; resumes from its last checkpoint. The result is `--out`, a checkpoint like the demo's.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from model import DemoModel, Shape, load_hub_tensors
from safetensors.torch import load_file
from train import ROOT, SHIPPED, Recipe, export_checkpoint, run

LARGER = Shape(num_hidden_layers=12, num_experts=64, moe_intermediate_size=32)
RECIPE = Recipe(warmup_steps=20, batch_tokens=2048, trunk_factor=0.1, save_every_s=120.0)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def demo_model() -> DemoModel:
    """The shipped demo model."""
    config = json.loads((SHIPPED / "config.json").read_text())
    model = DemoModel(Shape(**{name: config[name] for name in Shape.__dataclass_fields__}))
    with torch.no_grad():
        load_hub_tensors(model, load_file(SHIPPED / "model.safetensors"))
    return model


def grown(demo: DemoModel, shape: Shape) -> DemoModel:
    """A model of this shape with the demo model's trunk. Its routers and experts are new.

    Every layer of the demo model becomes `repeat` layers in a row that add an equal share of its
    attention's output.
    """
    model = DemoModel(shape)
    repeat = shape.num_hidden_layers // demo.shape.num_hidden_layers
    with torch.no_grad():
        model.embed_tokens.load_state_dict(demo.embed_tokens.state_dict())
        model.norm.load_state_dict(demo.norm.state_dict())
        for index, layer in enumerate(model.layers):
            source = demo.layers[index // repeat]
            for name in ("input_layernorm", "self_attn", "post_attention_layernorm"):
                getattr(layer, name).load_state_dict(getattr(source, name).state_dict())
            layer.self_attn.o_proj.weight.div_(repeat)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=27.0, help="training time")
    parser.add_argument("--out", type=Path, default=ROOT / "out/forecast/model-12x64")
    parser.add_argument("--work", type=Path, default=ROOT / "build/model-12x64")
    parser.add_argument("--export-only", action="store_true", help="export the last checkpoint")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = grown(demo_model(), LARGER)
    if not args.export_only:
        args.work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as rendezvous:
            dist.init_process_group(
                "gloo", init_method=f"file://{rendezvous}/store", rank=0, world_size=1
            )
            run(model, RECIPE, args.work, args.minutes)
            dist.destroy_process_group()
    export_checkpoint(model, args.work, args.out)
    for name in TOKENIZER_FILES:
        shutil.copyfile(SHIPPED / name, args.out / name)


if __name__ == "__main__":
    main()
