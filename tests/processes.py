"""Scripts in Python processes forked from one that has imported torch, and what of it takes seconds: each begins at once."""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
import warnings
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["torch._dynamo", *(f"torch.distributed.{part}" for part in ("checkpoint", "fsdp", "tensor"))])


def _run(script, arguments, environment, folder):
    """In the process: what ``python SCRIPT ARGUMENTS`` or ``python -m MODULE ARGUMENTS`` does, with one thread and no warnings.
    What it writes goes into files of ``folder``."""
    import torch

    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
    os.environ.update(environment)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.argv[:] = [script, *arguments]
    sys.path[:0] = [str(Path(script).parent), str(Path(__file__).parents[1])]
    if script.endswith(".py"):
        runpy.run_path(script, run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)


def words(**options):
    """Options of a command line as words of it; a list is several values of one."""
    values = {name: value if isinstance(value, list) else [value] for name, value in options.items()}
    return [word for name, several in values.items() for word in (f"--{name}", *map(str, several))]


def _of_group(size):
    """What torchrun tells each process of a group about it; of none, nothing."""
    if not size:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    return [common | {"RANK": rank, "LOCAL_RANK": rank} for rank in map(str, range(size))]


def run_script(script, *arguments, group=0, timeout=240, **variables):
    """Runs the script, or module, in one process or in those of a group, with these environment variables. Returns the exit
    status, and what was written to stdout and to stderr. Once one fails, or it takes longer, all are killed; the status is that
    of the one that failed."""
    with TemporaryDirectory() as folder:
        call = str(script), list(map(str, arguments))
        processes = [FORKED.Process(target=_run, args=(*call, told | variables, folder)) for told in _of_group(group)]
        for process in processes:
            process.start()
        until, status, late = time.monotonic() + timeout, 0, ""
        while not status and (running := [process.sentinel for process in processes if process.exitcode is None]):
            if not wait(running, max(until - time.monotonic(), 0.0)):
                status, late = -signal.SIGKILL, f"took more than {timeout} s"
            status = next((process.exitcode for process in processes if process.exitcode), status)
        for process in processes:
            process.kill()
            process.join()
        out, err = (file.read_text() if file.exists() else "" for file in (Path(folder, "out"), Path(folder, "err")))
        return status, out, err + late
