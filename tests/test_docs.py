"""The documentation: its code runs as it is printed, its loops learn, its links hold, and no message is left out."""

import ast
import doctest
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import adabayes_fused
from adabayes_fused import AdaBayes

DOCS = Path(__file__).parents[1] / "docs"
NEEDS = {
    "accelerate.md": ("accelerate", "sklearn"),
    "choosing.md": ("sklearn",),
    "huggingface.md": ("transformers", "accelerate", "sklearn"),
    "lightning.md": ("lightning", "sklearn"),
    "memory.md": ("sklearn",),
    "pytorch.md": ("sklearn",),
}

pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="needs the source tree")


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def code_of(page):
    (block,) = re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
    return block


def run(page, code, folder, monkeypatch):
    """The variables that the code leaves."""
    missing = [name for name in NEEDS[page] if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{page} needs {', '.join(missing)}: pip install 'adabayes_fused[frameworks]' scikit-learn")
    if "torch.compile" in code and shutil.which("c++") is None and not torch.cuda.is_available():
        pytest.skip(f"{page} compiles: needs a C++ compiler")
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    torch.set_num_threads(1)  # more would wait for each other on a busy machine
    variables = {"__name__": page.replace(".", "_")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the frameworks
        exec(compile(code, str(DOCS / page), "exec"), variables)
    return variables


@pytest.mark.parametrize("page", ["../README.md", *sorted(page.name for page in DOCS.glob("*.md") if page.name not in NEEDS)])
def test_the_code_runs(page, tmp_path, monkeypatch):
    """A page's blocks one after the other; one that begins by saying that it needs a GPU is only compiled without one."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
    if any("torch.compile" in block for block in blocks) and shutil.which("c++") is None:
        pytest.skip(f"{page} compiles: needs a C++ compiler")
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    variables = {"__name__": page}
    for block in blocks:
        code = compile(block, page, "exec")
        if torch.cuda.is_available() or not block.startswith("# on a GPU"):
            exec(code, variables)


@pytest.mark.parametrize("page", NEEDS)
def test_the_loop_learns(page, tmp_path, monkeypatch):
    optimizers = []
    real = AdaBayes.__init__

    def noted(self, *args, **kwargs):
        optimizers.append(self)
        real(self, *args, **kwargs)

    monkeypatch.setattr(AdaBayes, "__init__", noted)
    losses = run(page, code_of(page), tmp_path, monkeypatch)["losses"]
    (optimizer,) = optimizers
    part = len(losses) // 4
    first, last = (sum(some) / part for some in (losses[:part], losses[-part:]))
    assert 1 < first < 2.5  # guessing among ten digits costs log(10) = 2.3
    assert last < first / 3
    counts = {int(optimizer.state[p]["step"]) for group in optimizer.param_groups for p in group["params"]}
    assert len(counts) == 1
    assert min(counts) > 100
    assert optimizer.param_groups[0]["batch_size"] % 64 == 0  # more where the frameworks find several GPUs
    assert all(group["weight_decay"] == 0.05 for group in optimizer.param_groups if group["params"][0].dim() > 1)


def changed(code, *replacements):
    for old, new in replacements:
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    return code


RESUME = {  # what interrupts each page's loop, and what goes on with other initial weights: None, the page as it is
    "pytorch.md": ([("epochs, batch_size = 6", "epochs, batch_size = 2")], []),
    "huggingface.md": (None, [("trainer.train()", 'trainer.train(resume_from_checkpoint="out/checkpoint-56")')]),
    "accelerate.md": (
        [("range(6)", "range(2)")],
        [("range(6)", "range(2, 6)"), ("losses = []", 'losses = []\naccelerator.load_state("checkpoint")')],
    ),
}


@pytest.mark.parametrize("page", RESUME)
def test_the_loop_goes_on_where_it_was_interrupted(page, tmp_path, monkeypatch):
    interrupt, resume = RESUME[page]
    code = code_of(page).replace("torch.compile(model)", "model")
    whole = run(page, code, tmp_path / "whole", monkeypatch)
    folder = "whole"
    if interrupt is not None:
        folder = "parts"
        run(page, changed(code, *interrupt), tmp_path / folder, monkeypatch)
    rest = changed(code, ("torch.manual_seed(0)", "torch.manual_seed(1)"), *resume)
    last = run(page, rest, tmp_path / folder, monkeypatch)
    assert last["losses"][-20:] == whole["losses"][-20:]
    for p, q in zip(last["model"].parameters(), whole["model"].parameters(), strict=True):
        assert torch.equal(p, q)


# --- What is written --------------------------------------------------------------------------------------------------

PACKAGE = Path(adabayes_fused.__file__).parent


def words_of(node):
    """The fixed parts of a message, as the code puts it together."""
    if isinstance(node, ast.JoinedStr):
        return [part.value for part in node.values if isinstance(part, ast.Constant)]
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    return [words for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr) for words in words_of(part)]


def messages():
    """(place, fixed parts) of every error and warning with words of its own, and of every reason why a backend is not there."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            told = None
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                told = node.exc.args
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("warnings.warn"):
                told = node.args[:1]
            elif isinstance(node, ast.Return) and path.parent.name == "backends":
                told = [node.value] if isinstance(node.value, ast.Constant | ast.JoinedStr) else None
            parts = [words for argument in told or () for words in words_of(argument) if len(words.strip()) > 11]
            if parts:
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", parts


def test_every_message_is_explained():
    """In the first column of a table, by words that stand in it."""
    cells = re.findall(r"^\| (`.*?) \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    told = [words.strip() for code in re.findall(r"`([^`]+)`", " ".join(cells)) for words in code.split("…") if len(words) > 9]
    found = list(messages())
    assert len(found) > 50
    missing = [(place, parts) for place, parts in found if not any(words in part for part in parts for words in told)]
    assert not missing


def sentences(page):
    """Of the text, without code, tables and headings."""
    text = re.sub(r"^```.*?^```$|<!--.*?-->", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = [line for line in text.splitlines() if not re.match(r"\s*[|#]|!\[", line)]
    paragraphs = re.split(r"\n\s*\n|\n(?=\s*[-*] )", "\n".join(lines))
    for paragraph in paragraphs:
        plain = re.sub(r"\]\([^)]*\)", "]", " ".join(paragraph.split()))
        plain = re.sub(r"`[^`]*`", "code", plain)
        yield from re.split(r"(?<=[.?!])(?:\*\*|\))?\s+", plain)


@pytest.mark.parametrize("page", [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name)
def test_no_sentence_is_long(page):
    long = [sentence for sentence in sentences(page) if len(sentence.split()) > 30]
    assert not long


def test_the_examples_of_the_docstrings():
    """Everybody who is public has one, and it does as it says."""
    finder, runner = doctest.DocTestFinder(recurse=True), doctest.DocTestRunner(verbose=False)
    public = [getattr(adabayes_fused, name) for name in adabayes_fused.__all__ if name != "__version__"]
    shared = adabayes_fused.AdaBayes.__mro__[1]
    tests = {test.name: test for thing in (*public, shared) for test in finder.find(thing)}
    for name in ("AdaBayes", "AdaBayesFP", "posterior", "diagnostics", "release_gradients"):
        assert tests[name].examples, name
    for name in ("step", "set_batch_size", "load_adam_state_dict"):
        assert tests[f"{shared.__name__}.{name}"].examples, name
    failed = [name for name, test in tests.items() if runner.run(test, out=lambda _: None).failed]
    assert not failed


def test_the_site_builds_without_a_warning(tmp_path):
    if importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip("needs MkDocs: pip install 'adabayes_fused[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=DOCS.parent, capture_output=True, text=True, env=quiet)
    assert done.returncode == 0, done.stderr
    built = {page.stem for page in (tmp_path / "site").glob("*.html")}
    assert {page.stem for page in DOCS.glob("*.md")} <= built
    assert "bench/site.py" not in "".join(page.read_text() for page in (tmp_path / "site").glob("*.html"))
