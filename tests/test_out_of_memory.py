"""Out of memory at any allocation of a step: it raises and nothing has changed, or it is whole. It never ends the process.

A library of a few lines, loaded before all others, fails one allocation of C++ or of torch's CPU memory; ``_testcapi`` one of
Python's own. Each case runs in a process of its own, whose last line says where it went wrong.
"""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from adabayes_fused.backends import cpp

COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux" or not COMPILER, reason="needs Linux and a C++ compiler"),
    pytest.mark.skipif(cpp.unavailable(torch.device("cpu")) is not None, reason="the compiled module is not there"),
]
SOURCE = r"""
#include <cerrno>
#include <cstdlib>
#include <dlfcn.h>
#include <new>
namespace {
thread_local long left = 0;  // allocations of this thread until the one that fails; 0: none does
thread_local long seen = 0;
thread_local bool armed = false;
bool fails() { return armed && (++seen, left && --left == 0); }
void* take(std::size_t n) {
  void* p = fails() ? nullptr : std::malloc(n ? n : 1);
  if (!p) throw std::bad_alloc();
  return p;
}
}  // namespace
extern "C" void arm(long at) { left = at, seen = 0, armed = true; }
extern "C" long disarm() { armed = false; return seen; }
extern "C" int posix_memalign(void** out, std::size_t align, std::size_t n) {
  static const auto real = reinterpret_cast<int (*)(void**, std::size_t, std::size_t)>(dlsym(RTLD_NEXT, "posix_memalign"));
  return fails() ? ENOMEM : real(out, align, n);
}
void* operator new(std::size_t n) { return take(n); }
void* operator new[](std::size_t n) { return take(n); }
void* operator new(std::size_t n, const std::nothrow_t&) noexcept { return fails() ? nullptr : std::malloc(n ? n : 1); }
void* operator new[](std::size_t n, const std::nothrow_t&) noexcept { return fails() ? nullptr : std::malloc(n ? n : 1); }
void operator delete(void* p) noexcept { std::free(p); }
void operator delete[](void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
void operator delete[](void* p, std::size_t) noexcept { std::free(p); }
"""
CASES = [
    ("one dtype", 0, None, False),
    ("one dtype", 2, None, False),
    ("one dtype", 2, 0.5, False),
    ("one dtype", 2, None, True),
    ("two dtypes, gapped", 0, None, False),
    ("two dtypes, gapped", 2, None, False),
    ("two dtypes, gapped", 2, 0.5, True),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("oom")
    (folder / "oom.cpp").write_text(SOURCE)
    command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "oom.cpp", "-o", "liboom.so", "-ldl"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the compiler cannot build a shared library: {done.stderr}")
    return folder / "liboom.so"


def in_child(library, *arguments):
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", __file__, *map(str, arguments)],
        env={**os.environ, "LD_PRELOAD": str(library), "OOM_LIBRARY": str(library)},
        capture_output=True,
        text=True,
        timeout=300,
    )


# Each takes up to a minute; the others by hand: ``LD_PRELOAD=... OOM_LIBRARY=... python tests/test_out_of_memory.py python 3``.
@pytest.mark.parametrize(("whose", "case"), [("native", 0), ("native", 3), ("native", 6), ("python", 1), ("python", 6)])
def test_a_step_without_memory_changes_nothing(whose, case, library):
    if whose == "python":
        pytest.importorskip("_testcapi")
    done = in_child(library, whose, case)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def test_the_library_is_what_allocates(library):
    done = in_child(library, "count", 0)
    assert int(done.stdout) > 3, done.stdout + done.stderr


# --- In the child -----------------------------------------------------------------------------------------------------


def fail_each(whose, case):
    import ctypes

    from test_interrupts import begun, differences, values

    torch.set_num_threads(1)
    library = ctypes.PyDLL(os.environ["OOM_LIBRARY"])  # called without letting go of Python's lock

    def start():
        kind, steps, norm, skip = CASES[case]
        params, optimizer = begun("cpp", kind, steps, norm)
        optimizer.skip_nonfinite = skip
        # Made once; pybind11 itself does not survive where it finds no memory for the object.
        optimizer._stepper.reader(optimizer._given())
        return params, optimizer

    params, optimizer = start()
    whole = [values(params, optimizer)]
    for _ in range(2):
        optimizer.step()
        whole.append(values(params, optimizer))
    if whose == "count":
        library.arm(0)
        optimizer.step()
        return print(library.disarm())

    def one(at):
        """A step whose ``at``-th allocation fails: what is wrong afterwards; None where it makes fewer of them."""
        params, optimizer = start()
        arm, disarm = library.arm, library.disarm
        if whose == "python":
            import _testcapi

            arm, disarm = lambda at: _testcapi.set_nomemory(at, at + 1), lambda: (_testcapi.remove_mem_hooks(), 0)[1]
        raised = deepest = None
        arm(at)
        try:
            optimizer.step()
        except (MemoryError, RuntimeError, SystemError, TypeError) as error:  # pybind11 has other words for it
            seen, raised = disarm(), error
            traceback = error.__traceback__
            while traceback.tb_next:
                traceback = traceback.tb_next
            deepest = traceback.tb_frame.f_code.co_filename
        else:
            seen = disarm()
        if not raised and seen < at:
            return None
        found = values(params, optimizer)
        of_nothing, of_all = differences(found, whole[0]), differences(found, whole[1])
        # What torch's wrapper around step() raises after it, comes too late to undo it.
        late = raised and "adabayes_fused" not in deepest and not of_all
        if of_nothing if raised and not late else of_all:
            return f"{raised!r:.80}: changed {of_nothing[:6]}, and not {of_all[:6]}"
        optimizer.step()
        later = differences(values(params, optimizer), whole[1 if raised and not late else 2])
        return f"{raised!r:.80}: the step after it differs in {later[:6]}" if later else ""

    wrong, at, quiet = [], 0, 0
    while quiet < 10 if whose == "python" else not quiet:  # Python's are not counted: until ten that it tries were not wanted
        at += 1 if whose == "native" else 3  # Python's are hundreds
        read, write = os.pipe()
        if not os.fork():  # a process each, as it may not survive
            words = one(at)  # what it raises ends the process with its traceback
            os.write(write, b"fewer" if words is None else words.encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            words = pipe.read()
        _, status = os.wait()
        if os.WIFSIGNALED(status) and whose == "native":  # without Python's memory torch itself does not live on
            words = f"the process died of signal {os.WTERMSIG(status)}"
        elif os.WIFEXITED(status) and os.WEXITSTATUS(status):
            words = "another error, printed above"
        quiet = quiet + 1 if words == "fewer" else 0
        if words and words != "fewer":
            wrong.append(f"allocation {at}: {words}")
    print(f"{len(wrong)} of {at} allocations", *wrong, sep="\n", flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    fail_each(sys.argv[1], int(sys.argv[2]))
