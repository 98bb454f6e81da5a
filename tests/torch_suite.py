"""PyTorch's own optimizer tests, test/test_optim.py of its repository, which is in no wheel of torch.

``path`` finds that file, or fetches it into the user's cache; ``load`` executes it over other optimizers than torch's.
What is missing skips the module that asks, and says what to do.
"""

import hashlib
import importlib.util
import os
import sys
import tarfile
import types
import urllib.request
import warnings
from http.client import HTTPException
from pathlib import Path
from typing import NoReturn

import pytest
import torch

VARIABLE = "TORCH_TEST_OPTIM"  # the path of a test_optim.py to take, of another release say
RELEASE = "2.12.1"
SHA256 = "dcbcea18764282a8412a86e9fc2945e0692567e4c64f573541eac7d20649918b"
GITHUB = f"https://raw.githubusercontent.com/pytorch/pytorch/v{RELEASE}/test/test_optim.py"
DEBIAN = f"http://deb.debian.org/debian/pool/main/p/pytorch/pytorch_{RELEASE}+dfsg.orig.tar.xz"
TIMEOUT = 3  # seconds, for each address of a host: behind a firewall one waits for all of them
IMPORTED = {  # by test_optim.py from files beside it, for whoever runs it as a script
    "optim.test_lrscheduler": "TestLRScheduler",
    "optim.test_optim": "TestDifferentiableOptimizer",
    "optim.test_swa_utils": "TestSWAUtils",
}


def _skip(reason: str) -> NoReturn:
    pytest.skip(reason, allow_module_level=True)


# --- The file ---------------------------------------------------------------------------------------------------------


def path() -> Path:
    """The test_optim.py that the variable names; else the release's, from the cache or fetched into it."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE]).resolve(strict=True)
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adabayes_fused" / f"test_optim-{RELEASE}.py"
    if not (cached.is_file() and _right(cached.read_bytes())):
        part = cached.with_suffix(f".{os.getpid()}")
        content = _fetch()
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(content)
            part.replace(cached)  # at once: another run may be reading
        except OSError as error:
            _skip(f"PyTorch's tests cannot be kept ({error}); set XDG_CACHE_HOME to a folder that can be written to")
    return cached


def _right(content: bytes) -> bool:
    return hashlib.sha256(content).hexdigest() == SHA256


def _fetch() -> bytes:
    failures = []
    for url, get in ((GITHUB, _file), (DEBIAN, _file_in_tarball)):
        try:
            content = get(url)
            if _right(content):
                return content
            failures.append(f"{url}: not the file of sha256 {SHA256}")
        except (OSError, EOFError, HTTPException, tarfile.TarError) as error:
            failures.append(f"{url}: {error}")
    _skip(
        f"PyTorch's tests cannot be fetched; set {VARIABLE} to the path of its test/test_optim.py, release {RELEASE}. "
        + "; ".join(failures)
    )


def _file(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
        return response.read()


def _file_in_tarball(url: str) -> bytes:
    """The tarball is 41 MB; it is read up to the file."""
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response, tarfile.open(fileobj=response, mode="r|xz") as tar:
        for member in tar:
            if member.name.split("/")[1:] == ["test", "test_optim.py"]:
                return tar.extractfile(member).read()
    raise OSError("no test/test_optim.py in it")


# --- Its tests --------------------------------------------------------------------------------------------------------


def common_optimizers() -> types.ModuleType:
    """torch.testing._internal.common_optimizers, imported so that other tests of the same process do not feel it."""
    if importlib.util.find_spec("expecttest") is None:
        _skip("PyTorch's tests need the package expecttest; pip install expecttest")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends, "disable_global_flags", lambda: None)  # it would make torch.backends read-only
        patch.delenv("CI", raising=False)  # it, or its absence, would choose a profile for everybody's hypothesis tests
        patch.setenv("PYTORCH_HYPOTHESIS_PROFILE", "default")
        return importlib.import_module("torch.testing._internal.common_optimizers")


def load(file: Path, infos: list) -> type:
    """Executes test_optim.py with ``infos`` in place of torch's list of optimizers; returns its tests for the CPU."""
    spec = importlib.util.spec_from_file_location("torch_test_optim", file)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(common_optimizers(), "optim_db", infos)
        for name in ("optim", *IMPORTED):
            patch.setitem(sys.modules, name, types.ModuleType(name))
            if name in IMPORTED:
                setattr(sys.modules[name], IMPORTED[name], None)
        warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)  # torch's runner knows the mark "serial"
        try:
            spec.loader.exec_module(module)
        except ImportError as error:
            _skip(
                f"{file} does not fit torch {torch.__version__} ({error}); "
                f"set {VARIABLE} to the path of test/test_optim.py of that release"
            )
    sys.modules[spec.name] = module
    tests = module.TestOptimRenewedCPU
    for name in [name for name in vars(tests) if name.startswith("test_")]:
        if not any(f"_{info.name}_" in name for info in infos):
            delattr(tests, name)  # a test of torch's own classes
    return tests
