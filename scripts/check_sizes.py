"""The complexity budget: lines per file, class, package or native folder, and in all of src/."""

import ast
import sys
from collections import Counter
from pathlib import Path

FILE_LINES = 400
NATIVE = (".h", ".cpp", ".py")
CLASS_LINES = 200  # of src/, bench/ and scripts/
# docs/decisions/0011-line-budget.md says why; it is raised there first
TOTAL_LINES = 59_500


def long_classes(text: str) -> list[str]:
    """Classes of a file that are over the budget."""
    classes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)]
    sizes = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in classes}
    return [
        f"class {name}: {size} lines, allowed {CLASS_LINES}"
        for name, size in sizes.items()
        if size > CLASS_LINES
    ]


def main() -> int:
    """Prints lines per package; 1 if a budget is broken."""
    root = Path(__file__).parent.parent
    over: list[str] = []
    packages: Counter[str] = Counter()
    for folder in ("src", "tests", "bench", "scripts", "demo", "native"):
        endings = NATIVE if folder == "native" else (".py",)
        for path in sorted(p for p in (root / folder).rglob("*") if p.suffix in endings):
            text = path.read_text(encoding="utf-8")
            lines = len(text.splitlines())
            name = path.relative_to(root)
            if folder in ("src", "bench", "scripts"):
                over += [f"{name}: {found}" for found in long_classes(text)]
            if folder == "src":
                packages[name.parts[2].removesuffix(".py")] += lines
            if folder == "native":
                packages["/".join(name.parts[:2])] += lines
            limit = FILE_LINES if folder != "tests" else 2 * FILE_LINES
            if lines > limit:
                over.append(f"{name}: {lines} lines, allowed {limit}")
    total = sum(lines for name, lines in packages.items() if not name.startswith("native/"))
    if total > TOTAL_LINES:
        over.append(f"src: {total} lines, allowed {TOTAL_LINES}")
    print(", ".join(f"{name} {lines}" for name, lines in packages.most_common()), f"= {total}")
    print("\n".join(over))
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
