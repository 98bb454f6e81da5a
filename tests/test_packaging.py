"""What is built, and what is in it. Builds happen in copies, with this environment's tools and without a network."""

import email
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import adabayes_fused
from adabayes_fused.backends import cpp
from adabayes_fused.table import NUMBERS, ROW_WORDS

ROOT = Path(__file__).parent.parent
SOURCES = re.compile(r"\.(cpp|cu|h|py|md|txt|toml|yml|in|css|sh|typed|json|csv|png|pt)")
WITHOUT_SUFFIX = {".gitignore", "LICENSE", "Makefile", "fakecuda", "run"}
LEFT_OUT = re.compile(r"adabayes_fused: left out .*")
COMPILER_VARIABLES = ("CXX", "CC", "CUDACXX", "CUDA_PATH", "CUDA_HOME", "ADABAYES_FUSED_NATIVE", "ADABAYES_FUSED_CUDA")

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


def tools(folder, names):
    """A directory for PATH with these programs, or, for None, with all that are on PATH but nvcc."""
    folder.mkdir()
    for place in map(Path, os.environ["PATH"].split(os.pathsep)):
        for program in place.iterdir() if place.is_dir() else ():
            wanted = program.name in names if names is not None else program.name != "nvcc"
            if wanted and not (folder / program.name).is_symlink():
                (folder / program.name).symlink_to(program)
    return str(folder)


def run(command, cwd, **variables):
    environment = {k: v for k, v in os.environ.items() if k not in COMPILER_VARIABLES} | variables
    done = subprocess.run(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def wheel(source, out, **variables):
    """Builds a wheel; returns its path and what pip printed."""
    pip = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out), "."]
    printed = run(pip, source, **variables)
    (built,) = out.glob("*.whl")
    return built, printed


@pytest.fixture
def source(tmp_path):
    """A copy of the source tree: building writes into it."""
    ignore = shutil.ignore_patterns(".*", "build", "*.so", "*.egg-info", "__pycache__", "demo")
    return Path(shutil.copytree(ROOT, tmp_path / "source", ignore=ignore))


def needs(*programs):
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)} on PATH")


@needs("git")
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the repository")
def test_the_repository_holds_what_was_written_and_measured():
    """Not what was downloaded or built."""
    tracked = [Path(name) for name in run(["git", "ls-files", "-z"], ROOT).split("\0") if name]
    assert [str(file) for file in tracked if not SOURCES.fullmatch(file.suffix) and file.name not in WITHOUT_SUFFIX] == []
    assert [str(file) for file in tracked if (ROOT / file).exists() and (ROOT / file).stat().st_size > 500_000] == []


def test_version_stands_in_one_place(source):
    version = adabayes_fused.__version__
    assert importlib.metadata.version("adabayes_fused") == version
    files = [source / "pyproject.toml", source / "setup.py", source / "CMakeLists.txt", *source.glob("adabayes_fused/**/*.py")]
    assert [f.name for f in files if f'"{version}"' in f.read_text()] == ["_version.py"]


def test_pure_wheel(source, tmp_path):
    built, _ = wheel(source, tmp_path, ADABAYES_FUSED_NATIVE="0")
    assert built.name == f"adabayes_fused-{adabayes_fused.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(built) as archive:
        names = set(archive.namelist())
        metadata = email.message_from_bytes(archive.read(next(n for n in names if n.endswith("METADATA"))))
    modules = {str(f.relative_to(source)) for f in source.glob("adabayes_fused/**/*.py")}
    assert "adabayes_fused/optimizer.py" in modules
    kernels = {"adabayes_fused/" + str(f.relative_to(source)) for f in source.glob("triton_kernels/*.py")}
    assert "adabayes_fused/triton_kernels/rules.py" in kernels
    assert {n for n in names if ".dist-info/" not in n} == modules | kernels | {"adabayes_fused/py.typed"}
    assert any(n.endswith("LICENSE") for n in names)
    assert metadata["Version"] == adabayes_fused.__version__
    required = [r for r in metadata.get_all("Requires-Dist") if "extra" not in r]
    assert [re.match(r"\w+", r)[0] for r in required] == ["torch"]


def test_isolated_build_does_not_need_torch():
    requires = re.search(r"\[build-system\]\s*requires = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL)[1]
    assert "pybind11" in requires
    assert "torch" not in requires


@needs("cmake", "ninja", "c++")
def test_sdist_builds_without_nvcc(source, tmp_path):
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run([sys.executable, "-c", build, str(tmp_path)], source)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    for place in ("csrc", "docs", "examples", "hub", "triton_kernels", "tests"):
        here = {f.relative_to(source) for f in (source / place).rglob("*") if f.is_file() and f.suffix != ".pyc"}
        assert here
        assert {f.relative_to(unpacked) for f in (unpacked / place).rglob("*") if f.is_file()} == here

    path = tools(tmp_path / "bin", None)
    built, printed = wheel(unpacked, tmp_path, ADABAYES_FUSED_NATIVE="1", PATH=path, CMAKE_BUILD_TYPE="Debug")  # in half the time
    assert LEFT_OUT.findall(printed) == ["adabayes_fused: left out the CUDA kernels: nvcc was not found on the PATH"]
    check_cpu_only(built, tmp_path / "site")


@pytest.fixture
def broken_cuda(source):
    """Builds in seconds: a module of nothing but what is asked of it at once, and CUDA code no toolkit compiles."""
    for file in source.glob("csrc/*.cpp"):
        file.write_text("")
    asked = f'm.attr("ROW_WORDS") = {ROW_WORDS}; m.attr("NUMBERS") = {NUMBERS}; m.def("plain_tensors", [](pybind11::args) {{}});'
    (source / "csrc/module.cpp").write_text(f"#include <pybind11/pybind11.h>\nPYBIND11_MODULE(_native, m) {{ {asked} }}\n")
    (source / "csrc/cuda.cu").write_text("#error too old\n")
    return source


@needs("cmake", "ninja", "c++")
def test_cuda_can_be_declined(broken_cuda, tmp_path):
    built, printed = wheel(broken_cuda, tmp_path, ADABAYES_FUSED_NATIVE="1", ADABAYES_FUSED_CUDA="0")
    assert not LEFT_OUT.findall(printed)
    check_cpu_only(built, tmp_path / "site")


@needs("cmake", "ninja", "c++", "nvcc")
def test_cuda_that_does_not_build_does_not_cost_the_cpu_kernels(broken_cuda, tmp_path):
    built, printed = wheel(broken_cuda, tmp_path)
    (line,) = LEFT_OUT.findall(printed)
    assert line.startswith("adabayes_fused: left out the CUDA kernels: ")
    check_cpu_only(built, tmp_path / "site")


@needs("cmake", "ninja")
def test_no_compiler_leaves_a_package_that_imports(source, tmp_path):
    built, printed = wheel(source, tmp_path, PATH=tools(tmp_path / "bin", ("cmake", "ninja")))
    assert LEFT_OUT.findall(printed) == ["adabayes_fused: left out the compiled CPU and CUDA kernels: no C++ compiler was found"]
    code = "from adabayes_fused.backends import native; print(native.__file__, native.module)"
    file, module = installed(built, tmp_path / "site", code).split()
    assert file.startswith(str(tmp_path))
    assert module == "None"


@needs("cmake", "ninja")
def test_a_build_that_must_be_native_fails_without_a_compiler(source, tmp_path):
    with pytest.raises(AssertionError, match="CMAKE_CXX_COMPILER"):
        wheel(source, tmp_path, ADABAYES_FUSED_NATIVE="1", PATH=tools(tmp_path / "bin", ("cmake", "ninja")))


def installed(built, site, code):
    """Runs code in a fresh interpreter where the wheel, and no development install, is what is imported."""
    zipfile.ZipFile(built).extractall(site)
    alone = "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')]; "
    return run([sys.executable, "-c", alone + code], site, PYTHONPATH=str(site))


def check_cpu_only(built, site):
    code = "from adabayes_fused.backends.native import module; print(module.__file__, hasattr(module, 'run_cuda'))"
    file, has_cuda = installed(built, site, code).split()
    assert file.startswith(str(site))
    assert has_cuda == "False"


OPENMP = """
import re, torch, adabayes_fused
weight = torch.nn.Parameter(torch.ones(1 << 20))
weight.grad = torch.ones(1 << 20)
adabayes_fused.AdaBayesFP([weight], backend="cpp").step()
print(*{line.split()[-1] for line in open("/proc/self/maps") if re.search(r"lib(g|i)?omp", line)}, sep="\\n")
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
@pytest.mark.skipif(cpp.unavailable(torch.device("cpu")) is not None, reason="the compiled module is not there")
def test_one_openmp_runtime_is_loaded():
    """Two in one process have threads that spin against each other."""
    loaded = run([sys.executable, "-W", "ignore", "-c", OPENMP], ROOT).splitlines()
    assert len(loaded) == 1, loaded


FROM_THE_HUB = """
import importlib, pathlib, sys, torch
from kernels import get_local_kernel
kernels = get_local_kernel(pathlib.Path("build/hub"))
sys.modules["adabayes_fused.triton_kernels"] = kernels
for name in ("codes", "multi_tensor", "rules"):
    sys.modules[f"adabayes_fused.triton_kernels.{name}"] = importlib.import_module(f"{kernels.__name__}.{name}")
from adabayes_fused import AdaBayes
assert "build/hub" in sys.modules["adabayes_fused.triton_kernels.multi_tensor"].__file__
weights = []
for backend in ("triton", "foreach"):
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 33))
    optimizer = AdaBayes([weight], batch_size=8, backend=backend)
    for _ in range(3):
        weight.grad = weight.detach().sin()
        optimizer.step()
    weights.append(weight)
assert torch.equal(*weights)
assert not torch.equal(weights[0], torch.linspace(-1, 1, 33))
"""


@needs("make")
def test_the_hub_package_loads_and_computes(source):
    pytest.importorskip("kernels")
    pytest.importorskip("triton")
    run(["make", "hub"], source)
    shutil.rmtree(source / "triton_kernels")
    run([sys.executable, "-c", FROM_THE_HUB], source, TRITON_INTERPRET="1", HF_HUB_OFFLINE="1")
