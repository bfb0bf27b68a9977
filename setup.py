"""Adds the native library to the package: built where a compiler is found, else left out. All else
is in pyproject.toml."""

import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent / "native"))

import build_native as native


class BuildNative(build_ext):
    """Any failure leaves the library out: the package works without it."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.unlink(missing_ok=True)  # of an earlier build
        reason = native.missing()
        if reason is None:
            try:
                native.build(target)
                return
            except (OSError, subprocess.CalledProcessError) as error:
                reason = str(error)
        self.warn(f"native kernels: not built: {reason}; {native.COST}")

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"


class PlatformWheel(bdist_wheel):
    """For one platform and every Python: the library knows nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[Extension("windlass.kernels.cpu.libwindlass_cpu", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
