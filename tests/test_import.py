"""Importing costs nothing and needs nothing optional. In fresh interpreters, since this one has imported everything."""

import ast
import graphlib
import importlib.machinery
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import adabayes_fused

TRAIN = """
import torch
from adabayes_fused import AdaBayes, AdaBayesFP
for make in (lambda p: AdaBayes(p, lr=1e-2, batch_size=8), lambda p: AdaBayesFP(p, lr=1e-2)):
    w = torch.nn.Parameter(torch.ones(5))
    optimizer = make([w])
    for _ in range(3):
        optimizer.zero_grad()
        w.square().sum().backward()
        optimizer.step()
    assert (w < 1).all(), w
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_leaves_triton_and_cuda_alone():
    run(
        "import sys, torch\nbefore = 'triton' in sys.modules\nimport adabayes_fused\n"
        "assert before or 'triton' not in sys.modules\nassert not torch.cuda.is_initialized()"
    )


@pytest.mark.parametrize("blocked", ["triton", "adabayes_fused._native"])
def test_trains_without(blocked):
    run(f"import sys\nsys.modules[{blocked!r}] = None\n" + TRAIN)


def test_without_native_auto_is_foreach_and_cpp_says_what_to_do():
    out = run(
        "import sys\nsys.modules['adabayes_fused._native'] = None\n"
        + TRAIN
        + """
from adabayes_fused import backends
print(backends.choose("auto", torch.device("cpu")))
optimizer = AdaBayesFP([w], lr=1e-2, backend="cpp")
before = w.detach().clone()
try:
    optimizer.step()
except RuntimeError as error:
    print(error)
assert torch.equal(w, before)
"""
    )
    chosen, error = out.splitlines()
    assert chosen == "foreach"
    assert "backend='cpp'" in error
    assert "install a C++ compiler" in error
    assert "pip install" in error


def test_without_triton_its_backend_says_what_to_do():
    out = run(
        "import sys\nsys.modules['triton'] = None\n"
        + TRAIN
        + """
try:
    AdaBayesFP([w], lr=1e-2, backend="triton").step()
except RuntimeError as error:
    print(error)
"""
    )
    assert "pip install triton" in out


def imports_of(path):
    """The package's modules that one of them imports, for types too; not what a function imports when it is called."""
    package = ["adabayes_fused", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    nodes = list(ast.parse(path.read_text()).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("adabayes_fused")):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else module for name in names}
        nodes += [child for child in ast.iter_child_nodes(node) if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return found


PACKAGE = pathlib.Path(adabayes_fused.__file__).parent
FILES = [p for p in PACKAGE.rglob("*.py") if "triton_kernels" not in p.parts]
NAMES = [".".join(("adabayes_fused", *p.relative_to(PACKAGE).with_suffix("").parts)) for p in FILES]
MODULES = dict(zip((name.removesuffix(".__init__") for name in NAMES), FILES, strict=True))


def test_imports_go_one_way():
    """No module imports, for its types neither, one that needs it."""
    below = {name: imports_of(path) & MODULES.keys() - {name} for name, path in MODULES.items()}
    assert sum(map(len, below.values())) > 50
    # A package is what its file imports, and its modules may import each other without it.
    ordered = graphlib.TopologicalSorter(below).static_order()
    assert set(ordered) == MODULES.keys()


def test_the_optimizers_attributes_are_its_own():
    """No other module writes one; what another has it keep, it hands over to a method."""
    written = {}
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign) else []
            for target in targets:
                if isinstance(target, ast.Attribute) and "optimizer" in ast.unparse(target.value).split("."):
                    written[name] = ast.unparse(target)
    assert not written


IGNORED = shutil.ignore_patterns("_native*", "__pycache__", "triton_kernels")  # the sources have the last in another folder


def run_in_sources(tmp_path, *arguments, module=f"_native{importlib.machinery.EXTENSION_SUFFIXES[0]}", where="installed"):
    """Runs Python in a folder of sources without a module, beside an installed copy. A file of the module's name lies in one."""
    package = pathlib.Path(adabayes_fused.__file__).parent
    for folder in ("sources", "installed"):
        shutil.copytree(package, tmp_path / folder / package.name, ignore=IGNORED)
    (tmp_path / where / package.name / module).touch()
    paths = [str(tmp_path / "installed"), *(p for p in sys.path if p.endswith("-packages"))]
    return subprocess.run(
        [sys.executable, "-S", *arguments],  # without the finders of editable installations
        cwd=tmp_path / "sources",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )


def test_sources_in_the_way_of_the_installed_copy_are_said_once(tmp_path):
    done = run_in_sources(tmp_path, "-c", TRAIN)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Warning") == 1
    ways_out = "Run Python from another folder", "pip install --no-deps -e ."
    for told in ("no compiled kernels here", tmp_path / "sources", tmp_path / "installed", *ways_out):
        assert str(told) in done.stderr
    assert not run_in_sources(tmp_path / "filtered", "-W", "ignore::UserWarning", "-c", TRAIN).stderr


def test_the_report_tells_of_sources_in_the_way(tmp_path):
    done = run_in_sources(tmp_path, "-m", "adabayes_fused")
    assert done.returncode == 1
    line = next(line for line in done.stdout.splitlines() if line.split()[:2] == ["cpp", "no"])
    assert f"not the installed copy in {tmp_path / 'installed'}" in line


def test_a_module_of_another_python_is_named(tmp_path):
    done = run_in_sources(tmp_path, "-c", TRAIN, module="_native.cpython-399-none.so", where="sources")
    assert done.stderr.count("Warning") == 1
    assert "updated by the slow backend 'foreach'" in done.stderr
    assert "there is _native.cpython-399-none.so, which this Python does not load" in done.stderr


ON_A_GPU = """
import torch
torch.cuda.is_available = lambda: True
torch.cuda.current_device = lambda: 0
from adabayes_fused import backends
device = torch.device("cuda", 0)
backends.warn_of_foreach(device)
print(backends.choose("auto", device), backends.BACKENDS["triton"].unavailable(device))
"""


@pytest.mark.parametrize("installed", [True, False])
def test_sources_without_triton_kernels_fall_back_on_a_gpu(installed, tmp_path):
    """One warning: at import where there is an installed copy, else by the first step."""
    pytest.importorskip("triton")
    module = {} if installed else {"module": "none"}
    done = run_in_sources(tmp_path, "-c", ON_A_GPU, **module)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("foreach ")
    assert done.stderr.count("Warning") == 1
    for told in done.stdout, done.stderr:
        assert "pip install --no-deps -e ." in told
        assert str(tmp_path / "sources") in told
