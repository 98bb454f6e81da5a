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
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        options = [f"-DADABAYES_OUTPUT={output}", f"-DPython_EXECUTABLE={sys.executable}", "-DADABAYES_TESTS=OFF"]
        if CUDA == "0":
            options.append("-DADABAYES_CUDA=OFF")
        try:
            subprocess.run(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *options], check=True)
            subprocess.run(["cmake", "--build", build, "--target", "_native"], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            if NATIVE == "1":
                raise
            compiler = shutil.which(os.environ.get("CXX", "c++"))
            reason = f"{error}" if compiler else "no C++ compiler was found"
            print(f"adabayes_fused: left out the compiled CPU and CUDA kernels: {reason}", file=sys.stderr)
            return
        if not any("CMAKE_CUDA_COMPILER:" in line for line in (build / "CMakeCache.txt").read_text().splitlines()):
            print("adabayes_fused: left out the CUDA kernels: nvcc was not found", file=sys.stderr)


setup(
    ext_modules=[] if NATIVE == "0" else [Extension("adabayes_fused._native", [], optional=NATIVE != "1")],
    cmdclass={"build_ext": CMakeBuild},
)
