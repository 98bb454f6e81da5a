"""The pages of docs/: the code of each runs as it is printed, in a folder of its own, and every loop learns; the site builds."""

import ast
import doctest
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import adabayes_fused
from adabayes_fused import AdaBayes, AdaBayesFP

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = ["../README.md", *sorted(path.name for path in DOCS.glob("*.md"))]
NEEDS = {
    "accelerate.md": ("accelerate", "sklearn"),
    "choosing.md": ("sklearn",),
    "huggingface.md": ("transformers", "accelerate", "sklearn"),
    "lightning.md": ("lightning", "sklearn"),
    "memory.md": ("sklearn",),
    "pytorch.md": ("sklearn",),
}
LEARN = (*NEEDS, "adamw.md", "amp.md")  # pages with a whole loop, which leaves its losses

pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="needs the source tree")


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """One thread, as more would wait for each other on a busy machine; a process group of this process alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, value in dict(MASTER_ADDR="localhost", MASTER_PORT="0", RANK="0", WORLD_SIZE="1").items():
        monkeypatch.setenv(name, value)
    yield
    torch.set_num_threads(before)


def blocks(page):
    """(title, code) of each."""
    return re.findall(r"^```python(.*?)\n(.*?)^```$", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


def code_of(page):
    """All blocks of a page as one program. What needs a GPU says so in its title, and is only compiled where there is none."""
    for title, code in blocks(page):
        assert title in ("", ' title="on a GPU"'), (page, title)
        compile(code, str(DOCS / page), "exec")
    return "\n".join(code for title, code in blocks(page) if not title or torch.cuda.is_available())


def run(page, code, folder, monkeypatch):
    """The variables that the code leaves."""
    missing = [name for name in NEEDS.get(page, ()) if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{page} needs {', '.join(missing)}: pip install 'adabayes_fused[frameworks]' scikit-learn")
    if "torch.compile" in code and shutil.which("c++") is None and not torch.cuda.is_available():
        pytest.skip(f"{page} compiles: needs a C++ compiler")
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    variables = {"__name__": page.replace(".", "_")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the frameworks
        exec(compile(code, str(DOCS / page), "exec"), variables)
    return variables


def test_every_loop_is_checked():
    """A page whose code leaves ``losses`` is one of ``LEARN``."""
    assert {page for page in PAGES if re.search(r"^losses = ", code_of(page), re.MULTILINE)} == set(LEARN)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page) and page not in LEARN])
def test_the_code_runs(page, tmp_path, monkeypatch):
    run(page, code_of(page), tmp_path, monkeypatch)


@pytest.mark.parametrize("page", LEARN)
def test_the_loop_learns(page, tmp_path, monkeypatch):
    optimizers = []
    real = AdaBayes.__init__

    def noted(self, *args, **kwargs):
        optimizers.append(self)
        real(self, *args, **kwargs)

    monkeypatch.setattr(AdaBayes, "__init__", noted)
    losses = run(page, code_of(page), tmp_path, monkeypatch)["losses"]
    optimizer, *others = optimizers
    assert not others or page == "adamw.md"  # which also continues a run of AdamW
    part = len(losses) // 4
    first, last = (sum(some) / part for some in (losses[:part], losses[-part:]))
    low, high = (0.7, 1.5) if page in ("adamw.md", "amp.md") else (1, 2.5)  # guessing costs log(4) = 1.4 or log(10) = 2.3
    assert low < first < high
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


# --- Options ----------------------------------------------------------------------------------------------------------


def test_every_option_and_its_default_is_listed():
    """``batch_size`` has a default in one class alone."""
    rows = re.findall(r"^\| `(\w+)` \| (\S.*?) \|", (DOCS / "adamw.md").read_text(), re.MULTILINE)
    parameters = {**inspect.signature(AdaBayesFP).parameters, **inspect.signature(AdaBayes).parameters}
    del parameters["params"]
    assert {name for name, _ in rows} == parameters.keys()
    for name, default in rows:
        expected = parameters[name].default
        assert default == "none" if name == "batch_size" else ast.literal_eval(default.strip("`")) == expected, name


# --- Messages ---------------------------------------------------------------------------------------------------------


def messages() -> Iterator[tuple[str, list[str]]]:
    """(where it is, its fixed parts) of each error and warning of the package, but for the words that warn.py passes on."""
    sources = [*(ROOT / "adabayes_fused").rglob("*.py"), *(ROOT / "triton_kernels").glob("*.py")]
    for path in sorted(path for path in sources if path.name != "warn.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            call = node.exc if isinstance(node, ast.Raise) else node
            warns = isinstance(node, ast.Call) and ast.unparse(node.func).endswith("warn")
            if (warns or isinstance(node, ast.Raise)) and isinstance(call, ast.Call) and call.args:
                values = getattr(call.args[0], "values", [call.args[0]])
                fixed = [part.value for part in values if isinstance(part, ast.Constant) and isinstance(part.value, str)]
                yield f"{path.name}:{node.lineno}", fixed


def first_words(fixed: list[str]) -> str:
    """Up to four words of the first part that has two, else of the first."""
    part = next((part for part in fixed if len(re.findall(r"[^\W_]+", part)) > 1), fixed[0])
    return " ".join(part.split()[:4])


MESSAGES = list(messages())


def test_all_messages_are_found():
    assert len(MESSAGES) > 60
    assert all(fixed for _, fixed in MESSAGES)


@pytest.mark.parametrize(("where", "fixed"), MESSAGES, ids=[where for where, _ in MESSAGES])
def test_each_message_is_explained(where, fixed):
    explained = " ".join((DOCS / "troubleshooting.md").read_text().split())
    assert first_words(fixed) in explained


# --- Sentences and examples -------------------------------------------------------------------------------------------


def sentences(page):
    """Of the text, without code, formulas, tables and headings."""
    text = re.sub(r"^```.*?^```$|^\$\$.*?^\$\$$|<!--.*?-->", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = [line for line in text.splitlines() if not re.match(r"\s*[|#]|!\[", line)]
    paragraphs = re.split(r"\n\s*\n|\n(?=\s*[-*] )", "\n".join(lines))
    for paragraph in paragraphs:
        plain = re.sub(r"\]\([^)]*\)", "]", " ".join(paragraph.split()))
        plain = re.sub(r"`[^`]*`", "code", plain)
        yield from re.split(r"(?<=[.?!])(?:\*\*|\))?\s+", plain)


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name)
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


# --- The site ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built strictly: a warning, a broken link among them, is an error."""
    for needed in ("mkdocs", "mkdocstrings", "material", "latex2mathml"):
        pytest.importorskip(needed, reason="needs pip install 'adabayes_fused[docs]'")
    if not (ROOT / "mkdocs.yml").exists():
        pytest.skip("needs the repository")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {path.stem: path.read_text() for path in folder.glob("*.html")}


def test_no_page_asks_another_server(site):
    assert site.keys() > {page.removesuffix(".md") for page in PAGES[1:]} | {"changelog"}
    for page, text in site.items():
        assert not re.search(r'<(?:script|img|iframe|source)[^>]* src="?(?:https?:)?//', text), page
        assert not re.search(r'<link[^>]* rel="?(?:stylesheet|preconnect)"?[^>]* href="?(?:https?:)?//', text), page


def test_benchmarks_are_the_committed_ones(site):
    for path in (ROOT / "bench" / "results").rglob("results.json"):
        rows = [row for row in json.loads(path.read_text())["rows"] if row.get("what") == "step"]
        median = {(row["case"], row["contender"]): row["median_s"] for row in rows if "median_s" in row}
        for (case, name), seconds in median.items():
            if name.startswith("AdaBayes"):
                ratio = seconds / median[case, "torch AdamW fused"]
                shown = re.findall(rf"<td>{re.escape(name)}</td>(.*?)</tr>", site["benchmarks"], re.DOTALL)
                assert any(f">{ratio:.3f}<" in row or f">{ratio:.2f}<" in row for row in shown), (path, case, name)


def test_docstrings_and_formulas_are_drawn(site):
    assert site["how"].count("<math") > 10
    for page in ("how", "api"):
        text = re.sub(r"<pre.*?</pre>", "", site[page], flags=re.DOTALL)
        assert not re.search(r"``|:(?:class|meth|func|math):|\.\. math::|arithmatex|\\[a-z]+", text), page


def test_the_picture_of_the_limits_is_a_step_of_the_optimizer():
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("limits", DOCS / "site" / "limits.py")
    limits = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(limits)
    g = torch.logspace(-5, 0, 20, dtype=torch.float64)
    p = torch.nn.Parameter(torch.zeros_like(g))
    optimizer = AdaBayesFP([p], lr=limits.LR, sgd_lr=limits.SGD_LR, eps=0.0, weight_decay=0.0)
    p.grad = g.clone()
    optimizer.step()
    torch.testing.assert_close(-p.detach() / g, torch.from_numpy(limits.step_size(g.numpy())))
