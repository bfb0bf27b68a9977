"""Renders the model card from `evaluation.json` and `sources.json`; no figure is typed by hand."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "demo-data"
SHIPPED = ROOT / "src" / "windlass" / "data" / "demo"


def table(header: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    """A Markdown table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def heldout_section(evaluation: dict) -> str:
    rows: list[tuple[object, ...]] = []
    above = []
    for domain, row in evaluation["domains"].items():
        ours, theirs = row["bits_per_byte"], row["xz_bits_per_byte"]
        rows.append((domain, f"{row['bytes']:,}", f"{ours:.3f}", f"{theirs:.3f}"))
        if ours >= theirs:
            above.append(domain)
    verdict = (
        f"Not below xz: {', '.join(above)}." if above else "The model is below xz on every domain."
    )
    head = ("domain", "held-out bytes", "model, bits per byte", "`xz -9 -e`, bits per byte")
    return f"{table(head, rows)}\n\n{verdict}"


def expert_section(evaluation: dict) -> str:
    rows: list[tuple[object, ...]] = []
    for layer, row in enumerate(evaluation["layers"]):
        rows.append(
            (
                layer,
                f"{row['mutual_information_bits']:.3f}",
                f"{row['largest_share']:.1%}",
                f"{row['least_used_share']:.1%}",
                len(set(row["top_expert"].values())),
            )
        )
    head = (
        "layer",
        "expert tells about domain, bits",
        "largest share in one domain",
        "share of the least used expert",
        "different favourite experts",
    )
    return table(head, rows)


def source_section(sources: list[dict]) -> str:
    rows: list[tuple[object, ...]] = [
        (
            source["domain"],
            source["package"],
            source["version"],
            source["licence"],
            f"{source['used_bytes'] / 1e6:.2f}",
        )
        for source in sources
        if source["used_bytes"]
    ]
    return table(("domain", "Debian package", "version", "licence", "MB"), rows)


def main() -> None:
    evaluation = json.loads((ROOT / "demo" / "evaluation.json").read_text())
    sources = json.loads((BUILD / "sources.json").read_text())
    config = json.loads((SHIPPED / "config.json").read_text())
    size = sum(path.stat().st_size for path in SHIPPED.iterdir() if path.name != "README.md")
    values = {
        "parameters": f"{evaluation['parameters'] / 1e6:.2f}",
        "size": f"{size / 1e6:.1f}",
        "layers": config["num_hidden_layers"],
        "experts": config["num_experts"],
        "even_share": f"{1 / config['num_experts']:.1%}",
        "top_k": config["num_experts_per_tok"],
        "hidden": config["hidden_size"],
        "width": config["moe_intermediate_size"],
        "heads": config["num_attention_heads"],
        "kv_heads": config["num_key_value_heads"],
        "vocab": config["vocab_size"],
        "minutes": f"{evaluation['trained_s'] / 60:.0f}",
        "steps": f"{evaluation['trained_steps']:,}",
        "tokens": f"{evaluation['trained_tokens'] / 1e6:.1f}",
        "final_loss": f"{evaluation['final_loss']:.2f}",
        "difference": f"{evaluation['transformers_max_difference']:.1e}",
        "heldout": heldout_section(evaluation),
        "use": expert_section(evaluation),
        "sources": source_section(sources),
        "corpus": f"{sum(source['used_bytes'] for source in sources) / 1e6:.0f}",
    }
    template = (ROOT / "demo" / "card.template.md").read_text()
    (SHIPPED / "README.md").write_text(template.format(**values))


if __name__ == "__main__":
    main()
