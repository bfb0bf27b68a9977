"""Debian packages the demo model is trained on, and which of their files make which domain.

Every entry is reproducible by package name. The licence is the one of the files used here, as the
package's own `copyright` file states it.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Source:
    """Files of one package that feed one domain."""

    domain: str
    package: str
    licence: str
    pattern: str  # glob below the unpacked package
    kind: str  # html, mo, mo_en, code, roff, data, tar_c
    cap_bytes: int = 3_000_000


_HELP = "usr/share/libreoffice/help"
_WESNOTH = "usr/share/games/wesnoth/1.16/locale"
_CLDR = "usr/share/unicode/cldr/common"
_UCD = "usr/share/unicode"
_PY = "usr/lib/python3/dist-packages"


def _translated(domain: str, code: str, locale: str) -> tuple[Source, ...]:
    """The sources that German, French and Spanish share."""
    edu = f"debian-edu-doc-{code}"
    reference = f"debian-reference-{code}"
    book = f"usr/share/doc/debian-handbook/html/{locale}/*.html"
    return (
        Source(domain, "debian-handbook", "GPL-2+ or CC-BY-SA-3.0", book, "html"),
        Source(domain, edu, "GPL-2+", f"usr/share/doc/{edu}/*bookworm*manual.html", "html"),
        Source(domain, reference, "GPL-2+", "usr/share/debian-reference/ch*.html", "html"),
        Source(
            domain,
            "gnome-user-docs",
            "CC-BY-SA-3.0",
            f"usr/share/help/{code}/gnome-help/*.page",
            "html",
        ),
        Source(
            domain,
            f"libreoffice-help-{code}",
            "MPL-2.0",
            f"{_HELP}/{code}/text/**/*.html",
            "html",
            2_500_000,
        ),
        Source(
            domain,
            "wesnoth-1.16-data",
            "GPL-2+",
            f"{_WESNOTH}/{code}/LC_MESSAGES/*.mo",
            "mo",
        ),
    )


SOURCES: tuple[Source, ...] = (
    Source(
        "english", "anarchism", "GPL-2", "usr/share/doc/anarchism/html/*.html", "html", 1_500_000
    ),
    Source(
        "english",
        "python3.11-doc",
        "PSF-2.0",
        "usr/share/doc/python3.11/html/[lhtf]*/*.html",
        "html",
        1_500_000,
    ),
    Source(
        "english",
        "debian-handbook",
        "GPL-2+ or CC-BY-SA-3.0",
        "usr/share/doc/debian-handbook/html/en-US/*.html",
        "html",
    ),
    Source(
        "english",
        "gnome-user-docs",
        "CC-BY-SA-3.0",
        "usr/share/help/C/gnome-help/*.page",
        "html",
    ),
    Source(
        "english",
        "wesnoth-1.16-data",
        "GPL-2+",
        f"{_WESNOTH}/de/LC_MESSAGES/*.mo",
        "mo_en",
    ),
    *_translated("german", "de", "de-DE"),
    *_translated("french", "fr", "fr-FR"),
    *_translated("spanish", "es", "es-ES"),
    Source("python", "libpython3.11-stdlib", "PSF-2.0", "usr/lib/python3.11/**/*.py", "code"),
    Source("python", "python3-django", "BSD-3-Clause", f"{_PY}/django/**/*.py", "code", 1_500_000),
    Source("python", "python3-networkx", "BSD-3-Clause", f"{_PY}/networkx/**/*.py", "code"),
    Source("c", "linux-source-6.1", "GPL-2", "linux-source-6.1/**/*.c", "tar_c", 6_000_000),
    Source(
        "man", "manpages", "Linux-man-pages-copyleft, GPL, BSD", "usr/share/man/man*/*.gz", "roff"
    ),
    Source(
        "man",
        "manpages-dev",
        "Linux-man-pages-copyleft, GPL, BSD",
        "usr/share/man/man*/*.gz",
        "roff",
    ),
    Source("man", "git-man", "GPL-2", "usr/share/man/man*/*.gz", "roff", 2_000_000),
    Source("structured", "iso-codes", "LGPL-2.1+", "usr/share/iso-codes/json/iso_*.json", "data"),
    Source(
        "structured",
        "unicode-cldr-core",
        "Unicode-DFS-2016",
        f"{_CLDR}/main/[cdefinps][aerstlov].xml",
        "data",
        2_500_000,
    ),
    Source("structured", "unicode-data", "Unicode-DFS-2016", f"{_UCD}/UnicodeData.txt", "data"),
    Source("structured", "pci.ids", "GPL-2+ or BSD-3-Clause", "usr/share/misc/pci.ids", "data"),
    Source("structured", "tzdata", "public domain", "usr/share/zoneinfo/*.tab", "data"),
    Source(
        "structured",
        "freeciv-data",
        "GPL-2+",
        "usr/share/games/freeciv/**/*.ruleset",
        "data",
        2_000_000,
    ),
)

KERNEL_DIRS = ("kernel", "mm", "lib", "crypto", "block", "net/core", "net/ipv4", "fs/ext4", "init")

DOMAINS = tuple(dict.fromkeys(source.domain for source in SOURCES))
PACKAGES = tuple(dict.fromkeys(source.package for source in SOURCES))
