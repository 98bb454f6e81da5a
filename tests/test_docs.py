"""The pages of docs/: the code of each runs as it is printed, in a folder of its own, and learns."""

import importlib.util
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from adabayes_fused import AdaBayes

DOCS = Path(__file__).parents[1] / "docs"
NEEDS = {
    "accelerate.md": ("accelerate", "sklearn"),
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


def test_no_page_is_left_out():
    assert {page.name for page in DOCS.glob("*.md")} == NEEDS.keys()


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
