"""Which versions of Python and torch work: `make matrix`, or `nox -s "tests(python='3.11', torch='2.15.0')"` for one of them.

A session builds one wheel for its Python, without torch at hand, and tests it beside the torch it is named after, in a folder
without the sources. docs/versions.md holds what was found.
"""

import shutil
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "no"

HERE = Path(__file__).parent
TORCH = "2.13.0"  # with every Python
PYTHON = "3.11"  # with every torch
CELLS = [(PYTHON, torch) for torch in ("2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0")]
CELLS += [(python, TORCH) for python in ("3.10", "3.12", "3.13", "3.14")]
TESTS = [f"tests/test_{name}.py" for name in ("parity", "state", "layouts", "optimizer", "main", "memory")]
SHARDS = ("test_shards_are_rounded_as_the_whole", "test_every_split_has_its_elements_places_or_is_refused")
TESTS += [*(f"tests/test_codes.py::{name}" for name in SHARDS), "-k", "not triton"]


def built(session: nox.Session) -> str:
    """The wheel of the session's Python, with the CPU's kernels, which must build; made once a run."""
    folder = HERE / "build" / "matrix" / f"wheel-{session.python}"
    if not folder.exists():
        variables = {"ADABAYES_FUSED_NATIVE": "1", "ADABAYES_FUSED_CUDA": "0"}
        session.run("python", "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(folder), str(HERE), env=variables)
    (wheel,) = folder.glob("*.whl")
    return str(wheel)


@nox.session
@nox.parametrize("python,torch", CELLS)
def tests(session: nox.Session, torch: str) -> None:
    session.install(f"torch=={torch}", "numpy", "pytest", "expecttest", "hypothesis")
    session.install("--no-deps", built(session))
    folder = Path(session.create_tmp()) / "tested"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(HERE / "tests", folder / "tests", ignore=shutil.ignore_patterns("fakecuda", "__pycache__"))
    shutil.copy(HERE / "pyproject.toml", folder)
    session.chdir(folder)
    session.run("python", "-m", "pip", "freeze")
    session.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *(session.posargs or TESTS))
