"""Puts small faults into a file, one at a time, and tells which of them no test notices: ``make mutate``, or

    python tests/mutate.py adabayes_fused/clipping.py --count 40 --seed 0
    python tests/mutate.py csrc/batch.cpp --list

Works in copies of the project, with the compiled module that lies in ``adabayes_fused``. The tests of a file are in ``TESTS``.
They end at the first that fails, or at ``--seconds``: such a fault counts apart, as a slow machine may be the reason.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from tempfile import TemporaryDirectory
from typing import NamedTuple

HERE = Path(__file__).parents[1]
FOLDERS = ("adabayes_fused", "triton_kernels", "csrc", "tests", "bench", "docs", "examples")
COPIED = (*FOLDERS, "CMakeLists.txt", "pyproject.toml", "README.md")
STEP = ["errors", "options", "optimizer", "clipping", "state", "batch_size", "memory", "release", "resume"]
STEP += ["walk", "interrupts", "fuzz"]
TESTS = {
    "adabayes_fused/stepper.py": STEP,
    "adabayes_fused/prepare.py": ["layouts", *STEP, "codes"],
    "adabayes_fused/clipping.py": STEP,
    "adabayes_fused/checkpoint.py": ["resume", "state", "options", "errors", "codes", "warm_start", "walk", "optimizer"],
    "adabayes_fused/sharding.py": ["sharded_reports", "codes", "distributed", "resume"],
    "adabayes_fused/release.py": ["release", "resume", "errors", "memory", "sharded_reports"],
    "csrc/batch.cpp": ["memory", "layouts", *STEP, "codes", "distributed"],
}
COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATIONS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.And: ast.Or, ast.Or: ast.And}
IN_CPP = [("<=", "<"), (" < ", " <= "), (" >= ", " > "), ("==", "!="), ("!=", "=="), ("&&", "||"), ("||", "&&"), (" + ", " - ")]
IN_CPP += [(" - ", " + "), ("true", "false"), ("false", "true"), ("break;", ";")]


class Mutant(NamedTuple):
    line: int
    before: str
    after: str
    text: str  # the whole file


def mutants(path: Path) -> list[Mutant]:
    text = path.read_text()
    return list(_of_python(text) if path.suffix == ".py" else _of_cpp(text))


def _of_python(text: str) -> Iterator[Mutant]:
    tree = ast.parse(text)
    for at, node in enumerate(ast.walk(tree)):
        for choice in range(len(_changes(node))):
            changed = copy.deepcopy(tree)
            twin = list(ast.walk(changed))[at]
            before, after = ast.unparse(node), _changes(twin)[choice]()
            yield Mutant(node.lineno, before, after, ast.unparse(ast.fix_missing_locations(changed)))


def _changes(node: ast.AST) -> list:
    """Functions that change a node where it stands and return its new text."""

    def put(place: ast.AST, field: str, value) -> str:
        setattr(place, field, value)
        return ast.unparse(node)

    found = []
    if isinstance(node, ast.Compare):
        found.append(lambda: put(node, "ops", [COMPARISONS[type(node.ops[0])](), *node.ops[1:]]))
    if isinstance(node, (ast.BinOp, ast.AugAssign, ast.BoolOp)) and type(node.op) in OPERATIONS:
        found.append(lambda: put(node, "op", OPERATIONS[type(node.op)]()))
    if isinstance(node, (ast.If, ast.IfExp, ast.While)):
        found.append(lambda: put(node, "test", ast.UnaryOp(ast.Not(), node.test)))
    if isinstance(node, ast.Return) and node.value is not None and ast.unparse(node.value) != "None":
        found.append(lambda: put(node, "value", ast.Constant(None)))
    if isinstance(node, ast.Call) and node.keywords:
        found.append(lambda: put(node, "keywords", node.keywords[1:]))
    if isinstance(node, ast.Constant) and type(node.value) in (bool, int, float) and hasattr(node, "lineno"):
        found.append(lambda: put(node, "value", not node.value if node.value in (0, 1) else node.value + 1))
    for field in ("body", "orelse", "finalbody"):  # statements without their effect
        some = getattr(node, field, None)
        for i, one in enumerate(some if isinstance(some, list) else ()):
            call = isinstance(one, ast.Expr) and isinstance(one.value, ast.Call)
            stored = isinstance(one, ast.Assign) and not isinstance(one.targets[0], (ast.Name, ast.Tuple))
            if hasattr(node, "lineno") and (call or stored or isinstance(one, (ast.AugAssign, ast.Delete, ast.Continue))):
                found.append(lambda some=some, i=i: (ast.unparse(some[i]) + "  REMOVED", some.__setitem__(i, ast.Pass()))[0])
    return found


def _of_cpp(text: str) -> Iterator[Mutant]:
    lines = text.split("\n")
    for i, line in enumerate(lines):
        code = line.partition("//")[0]
        if not code.strip() or code.startswith("#") or "template" in code or "PyErr" in code:
            continue
        changed = [code[: m.start()] + new + code[m.end() :] for old, new in IN_CPP for m in re.finditer(re.escape(old), code)]
        if (start := code.find("if (")) >= 0:
            changed.append(code[: start + 4] + "!(" + _with_one_more_parenthesis(code[start + 4 :]))
        if re.fullmatch(r"\s+[\w.>\-\[\]]+(\(.*\)| [+|]?= .*|\+\+);", code) and "return" not in code:
            changed.append("")
        for new in changed:
            yield Mutant(i + 1, code.strip(), new.strip() or "REMOVED", "\n".join([*lines[:i], new, *lines[i + 1 :]]))


def _with_one_more_parenthesis(code: str) -> str:
    """After the one that closes a condition."""
    depth = 1
    for i, letter in enumerate(code):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return code[:i] + ")" + code[i:]
    return code


def copied(folder: Path) -> Path:
    for name in COPIED:
        source = HERE / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "fakecuda", "images", "results"))
        elif source.exists():
            shutil.copy(source, folder / name)
    return folder


def tried(mutant: Mutant, path: str, folder: Path, seconds: float) -> str:
    """The test that noticed it, or what else ended it; "SURVIVED"."""
    file = folder / path
    original = file.read_text()
    file.write_text(mutant.text)
    environment = os.environ | dict(PYTHONPATH=str(folder), PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1")
    tests = [f"tests/test_{name}.py" for name in TESTS[path]]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", "not triton", *tests]
    try:
        if file.suffix == ".cpp" and (failed := _built(folder, environment)):
            return failed
        run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return "time"
    finally:
        file.write_text(original)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", run.stdout, re.MULTILINE)
    return "SURVIVED" if run.returncode == 0 else failed[1] if failed else f"exit status {run.returncode}"


def _built(folder: Path, environment: dict[str, str]) -> str:
    build = folder / "build"
    options = [f"-DADABAYES_OUTPUT={folder / 'adabayes_fused'}", "-DADABAYES_CUDA=OFF", "-DADABAYES_TESTS=OFF"]
    configure = ["cmake", "-S", str(folder), "-B", str(build), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}", *options]
    for command in (*(() if build.exists() else (configure,)), ["cmake", "--build", str(build)]):
        if subprocess.run(command, env=environment, capture_output=True).returncode:
            return "the compiler"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("files", nargs="*", default=list(TESTS), help=f"of {', '.join(TESTS)}; default: all")
    parser.add_argument("--count", type=int, default=40, help="mutants of each file, drawn from all; default 40")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=300, help="for the tests of one mutant; default 300")
    parser.add_argument("--list", action="store_true", help="shows all mutants and runs none")
    options = parser.parse_args()
    survived = 0
    with TemporaryDirectory() as root:
        folders: Queue[Path] = Queue()
        for i in range(0 if options.list else options.jobs):
            folders.put(copied(Path(root) / str(i)))
        for path in options.files:
            if path not in TESTS:
                parser.error(f"there are no tests for {path!r} (allowed: {', '.join(TESTS)})")
            found = mutants(HERE / path)
            drawn = found if options.list else random.Random(options.seed).sample(found, min(options.count, len(found)))

            def one(mutant: Mutant, path: str = path) -> str:
                folder = folders.get()
                try:
                    outcome = tried(mutant, path, folder, options.seconds)
                finally:
                    folders.put(folder)
                print(f"{path}:{mutant.line}: {_short(mutant.before)} -> {_short(mutant.after)}: {outcome}", flush=True)
                return outcome

            if options.list:
                for m in drawn:
                    print(f"{path}:{m.line}: {_short(m.before)} -> {_short(m.after)}")
                continue
            outcome = tried(Mutant(0, "", "", (HERE / path).read_text()), path, Path(root) / "0", 10 * options.seconds)
            if outcome != "SURVIVED":
                parser.error(f"without any fault, the tests of {path} end with: {outcome}")
            with ThreadPoolExecutor(options.jobs) as pool:
                outcomes = list(pool.map(one, drawn))
            lived, late = outcomes.count("SURVIVED"), outcomes.count("time")
            survived += lived
            print(f"{path}: {len(drawn)} of {len(found)} mutants, {lived} survived, {late} were ended by --seconds", flush=True)
    return 1 if survived else 0


def _short(text: str) -> str:
    return " ".join(text.split())[:90]


if __name__ == "__main__":
    sys.exit(main())
