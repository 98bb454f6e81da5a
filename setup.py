"""Builds the native module with CMake (CMakeLists.txt is its only description); everything else is in pyproject.toml.

ADABAYES_FUSED_NATIVE=0 leaves the module out, =1 makes a failing build an error; else what cannot be built is left out.
ADABAYES_FUSED_CUDA=0 leaves the CUDA kernels out.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
NATIVE = os.environ.get("ADABAYES_FUSED_NATIVE", "auto")
CUDA = os.environ.get("ADABAYES_FUSED_CUDA", "auto")


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        reason = None
        for cuda in ("OFF",) if CUDA == "0" else ("ON", "OFF"):  # a CUDA toolkit too old must not cost the CPU kernels
            try:
                self.run_cmake(ext, cuda)
            except (OSError, subprocess.CalledProcessError) as error:
                if NATIVE == "1":
                    raise
                reason = error if self.found("CXX") or isinstance(error, OSError) else "no C++ compiler was found"
                what = "compiled CPU and CUDA kernels"
            else:
                what = "CUDA kernels"
                if cuda == "ON" and not self.found("CUDA"):
                    reason = "nvcc was not found on the PATH"
                break
        if reason:
            print(f"adabayes_fused: left out the {what}: {reason}", file=sys.stderr)

    def run_cmake(self, ext, cuda):
        options = {
            "ADABAYES_OUTPUT": Path(self.get_ext_fullpath(ext.name)).resolve().parent,
            "ADABAYES_CUDA": cuda,
            "ADABAYES_TESTS": "OFF",
            "Python_EXECUTABLE": sys.executable,
        }
        given = [f"-D{name}={value}" for name, value in options.items()]
        shutil.rmtree(self.build_temp, ignore_errors=True)  # remembers an isolated build's tools, which are gone
        subprocess.run(["cmake", "-S", ROOT, "-B", self.build_temp, "-G", "Ninja", *given], check=True)
        subprocess.run(["cmake", "--build", self.build_temp, "--target", "_native"], check=True)

    def found(self, language):
        """Whether CMake found a compiler for the language."""
        cache = Path(self.build_temp, "CMakeCache.txt")
        lines = cache.read_text().splitlines() if cache.exists() else []
        return any(line.startswith(f"CMAKE_{language}_COMPILER:") and not line.endswith("NOTFOUND") for line in lines)


setup(
    ext_modules=[] if NATIVE == "0" else [Extension("adabayes_fused._native", [], optional=NATIVE != "1")],
    cmdclass={"build_ext": CMakeBuild},
)
