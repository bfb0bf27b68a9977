"""Which instructions the functions of the library use: only those of a namespace made for them may
need AVX-512, or AVX. Inline functions that several files compile are one function after linking,
and code that runs while the library is loaded runs on every processor.

    python check_instructions.py libwindlass_cpu.so
"""

import re
import subprocess
import sys

_AVX512 = re.compile(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])")
_AVX = re.compile(r"\tv[a-z]|%ymm")
_FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")


def violations(library: str) -> tuple[int, list[str]]:
    """The number of functions, and a line for each that uses what its namespace does not allow."""
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", library]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    name, count, found = "", 0, {}
    for line in listing.splitlines():
        if match := _FUNCTION.match(line):
            name = match[1]
            count += 1
        elif "wl_avx512" in name or "wl_amx" in name:
            continue
        elif _AVX512.search(line) or ("wl_avx2" not in name and _AVX.search(line)):
            found.setdefault(name, line.strip())
    return count, [f"{name}: {line}" for name, line in found.items()]


def main(library: str) -> int:
    """0 if every function keeps to its instructions."""
    count, wrong = violations(library)
    assert count > 50, f"{library}: only {count} functions found"
    print("\n".join(wrong) or f"instructions of {count} functions: as their namespaces allow")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
