"""Builds the corpus of the demo model: downloads Debian packages, extracts text, splits it.

Run `python demo/data.py` (needs apt-get and dpkg, no root for downloading). Output below
`build/demo-data`: `train.jsonl`, `heldout.jsonl` (one document a line) and `sources.json`.
Held-out text is whole regions chosen by a hash of the file name, and every paragraph that also
occurs in held-out text is removed from training.
"""

import gettext
import gzip
import hashlib
import html
import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from sources import DOMAINS, KERNEL_DIRS, PACKAGES, SOURCES, Source

BUILD = Path(__file__).resolve().parent.parent / "build" / "demo-data"
REGION_BYTES = 16_000
HELDOUT_BYTES = 128_000
PROSE = frozenset({"english", "german", "french", "spanish"})


@dataclass(frozen=True, slots=True)
class Document:
    """One contiguous region of one file."""

    domain: str
    package: str
    name: str
    text: str


def fetch() -> None:
    """Downloads and unpacks every package once."""
    debs = BUILD / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    have = {deb.name.split("_")[0] for deb in debs.glob("*.deb")}
    missing = [package for package in PACKAGES if package not in have]
    if missing:
        subprocess.run(["apt-get", "download", *missing], cwd=debs, check=True)
    for package in PACKAGES:
        target = BUILD / "x" / package
        if not target.exists():
            (deb,) = debs.glob(f"{package}_*.deb")
            target.mkdir(parents=True)
            subprocess.run(["dpkg", "-x", str(deb), str(target)], check=True)
    kernel = BUILD / "x" / "linux-source-6.1"
    if not (kernel / "linux-source-6.1").exists():
        archive = kernel / "usr/src/linux-source-6.1.tar.xz"
        dirs = [f"linux-source-6.1/{name}" for name in KERNEL_DIRS]
        subprocess.run(["tar", "-xJf", str(archive), "-C", str(kernel), *dirs], check=True)


def package_version(package: str) -> str:
    """The version in the name of the downloaded package file."""
    (deb,) = (BUILD / "debs").glob(f"{package}_*.deb")
    return deb.name.split("_")[1].replace("%3a", ":")


def html_to_text(page: str) -> str:
    """Paragraphs of an HTML or Mallard page, without markup and navigation."""
    page = re.sub(r"(?is)<(script|style|head|header|aside|footer|nav|info)\b.*?</\1>", " ", page)
    page = re.sub(r"(?s)<!--.*?-->", " ", page)
    page = re.sub(r"\s+", " ", page)
    page = re.sub(
        r"(?i)</?(p|h\d|li|div|td|tr|dt|dd|pre|title|item|section|br)\b[^>]*>", "\n", page
    )
    page = html.unescape(re.sub(r"<[^>]+>", "", page))
    lines = (re.sub(r"\s+", " ", line).strip() for line in page.split("\n"))
    return "\n".join(line for line in lines if len(line) > 2)


def read_messages(path: Path, *, english: bool) -> str:
    """Long messages of a gettext catalogue, one paragraph each."""
    with path.open("rb") as file:
        catalog = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
    texts = (key if english else value for key, value in catalog.items() if isinstance(key, str))
    plain = (re.sub(r"<[^>]+>|\s+", " ", str(text).split("\x04")[-1]).strip() for text in texts)
    return "\n".join(" ".join(text.split()) for text in plain if len(text) > 50)


def read_file(source: Source, path: Path) -> str:
    """The text of one file, as its kind says."""
    if source.kind in ("mo", "mo_en"):
        return read_messages(path, english=source.kind == "mo_en")
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = raw.decode("utf-8", errors="ignore")
    if source.kind == "html":
        return html_to_text(text)
    if source.kind == "roff":
        text = "\n".join(line for line in text.split("\n") if not line.startswith('.\\"'))
        return text if len(text) > 400 else ""  # shorter pages only point to others
    return text


def regions(text: str, *, separator: str) -> Iterator[str]:
    """Cuts a text at paragraph or line ends into pieces of about REGION_BYTES."""
    piece: list[str] = []
    size = 0
    for part in text.split(separator):
        piece.append(part)
        size += len(part.encode()) + len(separator)
        if size >= REGION_BYTES:
            yield separator.join(piece).strip("\n")
            piece, size = [], 0
    if rest := separator.join(piece).strip("\n"):
        yield rest


def shuffle_key(name: str) -> str:
    """Order that does not depend on language: a page is held out in all translations at once."""
    return hashlib.sha256(name.encode()).hexdigest()


def documents_of(source: Source) -> list[Document]:
    """Regions of the files of one source, in hash order, up to its cap."""
    found: list[Document] = []
    size = 0
    root = BUILD / "x" / source.package
    paths = [path for path in root.glob(source.pattern) if path.is_file()]
    for path in sorted(paths, key=lambda path: shuffle_key(path.name.split(".")[0] + str(path))):
        if size >= source.cap_bytes:
            break
        stem = path.name.split(".")[0]
        for number, text in enumerate(regions(read_file(source, path), separator="\n")):
            if len(text) < 200:
                continue
            found.append(Document(source.domain, source.package, f"{stem}#{number}", text))
            size += len(text.encode())
    return found


def blocks(document: Document) -> list[str]:
    """The units that are compared between documents: lines of prose, blank-line blocks of code."""
    return document.text.split("\n" if document.domain in PROSE else "\n\n")


def without(document: Document, seen: set[str], *, remember: bool) -> Document:
    """The document without the long blocks that occur in `seen`."""
    shortest = 40 if document.domain in PROSE else 120
    kept: list[str] = []
    for block in blocks(document):
        key = " ".join(block.split())
        if len(key) >= shortest:
            if key in seen:
                continue
            if remember:
                seen.add(key)
        kept.append(block)
    text = ("\n" if document.domain in PROSE else "\n\n").join(kept)
    return Document(document.domain, document.package, document.name, text)


def split(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents of one domain, deduplicated, nothing shared.

    Each package gives to the held-out text in proportion to its size.
    """
    total = sum(len(document.text.encode()) for document in documents)
    per_package = Counter[str]()
    for document in documents:
        per_package[document.package] += len(document.text.encode())
    held_bytes = Counter[str]()
    heldout: list[Document] = []
    train: list[Document] = []
    seen: set[str] = set()
    for document in sorted(documents, key=lambda document: shuffle_key(document.name)):
        quota = HELDOUT_BYTES * per_package[document.package] / total
        if held_bytes[document.package] + len(document.text.encode()) / 2 <= quota:
            document = without(document, seen, remember=True)
            heldout.append(document)
            held_bytes[document.package] += len(document.text.encode())
        else:
            train.append(document)
    train = [without(document, seen, remember=True) for document in train]
    return [doc for doc in train if len(doc.text) >= 200], heldout


def main() -> None:
    fetch()
    summary = []
    by_domain: dict[str, list[Document]] = {domain: [] for domain in DOMAINS}
    for source in SOURCES:
        documents = documents_of(source)
        by_domain[source.domain] += documents
        used = sum(len(document.text.encode()) for document in documents)
        version = package_version(source.package)
        summary.append(asdict(source) | {"version": version, "used_bytes": used})
        print(f"{source.domain:11s}{source.package:24s}{used / 1e6:7.2f} MB")
    with (BUILD / "train.jsonl").open("w") as train_file, (BUILD / "heldout.jsonl").open("w") as f:
        for domain, documents in by_domain.items():
            train, heldout = split(documents)
            for file, part in ((train_file, train), (f, heldout)):
                file.writelines(json.dumps(asdict(document)) + "\n" for document in part)
            sizes = [sum(len(doc.text.encode()) for doc in part) / 1e6 for part in (train, heldout)]
            print(f"{domain:11s}train {sizes[0]:6.2f} MB  held out {sizes[1]:6.3f} MB")
    (BUILD / "sources.json").write_text(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
