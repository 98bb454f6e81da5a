"""The CMake project, built afresh: the C++ tests pass, and the module needs no CUDA or torch library to load."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.kernels import find_cuobjdump

ROOT = Path(__file__).parent.parent
NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc on PATH")
missing = [program for program in ("cmake", "ninja", "ctest", "c++") if shutil.which(program) is None]
missing += [] if importlib.util.find_spec("pybind11") else ["pybind11"]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)} to build")


def run(*command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    folder = tmp_path_factory.mktemp("build")
    options = ["-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    run("cmake", "-S", ROOT, "-B", folder, *options)
    run("cmake", "--build", folder)
    return folder


@pytest.fixture(scope="session")
def module(build):
    (file,) = build.glob("_native*.so")
    return file


@pytest.fixture(scope="session")
def cuobjdump():
    return find_cuobjdump() or pytest.skip("needs cuobjdump, of the CUDA toolkit or of triton")


def test_cpp_tests_pass(build):
    printed = run("ctest", "--test-dir", build, "--output-on-failure", "--no-tests=error")
    names = re.findall(r'\{"(\w+)", \1\}', (ROOT / "csrc/tests/test_kernels.cpp").read_text())
    assert names
    assert set(re.findall(r"Test +#\d+: (\w+) \.+ +Passed", printed)) == set(names)


def test_no_torch_and_no_cuda_library(build, module):
    commands = [command["command"] for command in json.loads((build / "compile_commands.json").read_text())]
    assert any("csrc/batch.cpp" in command for command in commands)
    assert not [command for command in commands if re.search(r"/torch/|-l?torch|libc10", command)]
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "-d", module))
    assert any(name.startswith("libstdc++") or name.startswith("libc++") for name in needed)
    assert not [name for name in needed if re.match(r"libcu|libnv|libtorch|libc10", name)]


def test_imports_alone(build):
    code = "import sys, _native; print(_native.cpu_isas()[-1], hasattr(_native, 'run_cuda'), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["baseline", str(NVCC is not None), "False"]


@needs_nvcc
def test_fat_binary_holds_each_architecture(module, cuobjdump):
    assert re.findall(r"\.(sm_\d+)\.cubin", run(cuobjdump, "--list-elf", module)) == ["sm_75", "sm_80", "sm_90", "sm_100"]
    assert "sm_100.ptx" in run(cuobjdump, "--list-ptx", module)


@needs_nvcc
def test_rule_is_not_contracted_on_the_gpu(module, cuobjdump):
    ptx = run(cuobjdump, "-ptx", module)
    assert "div.rn.f32" in ptx
    # ptxas may fuse what has no .rn.
    assert not re.findall(r"\bfma\.\S+|\b(?:add|sub|mul)\.f(?:32|64)", ptx)


def test_rule_is_not_contracted_on_the_cpu(build):
    commands = [command["command"] for command in json.loads((build / "compile_commands.json").read_text())]
    kernels = [command for command in commands if "cpu_kernel.cpp" in command]
    assert kernels
    assert all("-ffp-contract=off" in command and "-ffast-math" not in command for command in kernels)
