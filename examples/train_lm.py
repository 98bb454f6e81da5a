"""A run that survives: a small transformer learns a text character by character, in one process or many.

    torchrun --nproc_per_node 2 examples/train_lm.py text.txt --output runs/lm
    python examples/train_lm.py text.txt --output runs/lm

Processes talk over NCCL where there are GPUs, else over gloo. However a run was ended, while saving too, the same command
goes on from its last checkpoint and ends with the weights of a run that nobody disturbed, bit for bit on the same machine.
With ``torchrun --max-restarts 3`` torchrun gives that command itself. ``tensorboard --logdir runs`` shows the curves.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import hashlib
import json
import math
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read as CUDA starts: the same bits in every run

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.tensorboard import SummaryWriter

from adabayes_fused import AdaBayes, AdaBayesFP, diagnostics

HEAD = 32  # the width of an attention head
FREE = ("text", "output", "parallel", "save_every", "log_every")  # may change when a run goes on; all else makes another run
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Wrong(Exception):
    """What the user can put right; its text says how."""


# --- Text -------------------------------------------------------------------------------------------------------------


class Text(NamedTuple):
    train: Tensor  # characters as indices into the vocabulary
    validation: Tensor  # the last tenth of them
    vocabulary: str
    sha256: str


def read_text(path: Path, length: int) -> Text:
    content = path.read_bytes()
    try:
        codes = torch.tensor([*map(ord, content.decode())])
    except UnicodeDecodeError as error:
        raise Wrong(f"{path} is not UTF-8 text: {error}") from None
    split = len(codes) * 9 // 10
    if len(codes) - split <= length:
        raise Wrong(f"{path} is too short: the last tenth of its {len(codes):,} characters is for validation, which takes "
                    f"--sequence-length + 1 = {length + 1:,} of them; give a longer text or a shorter length")
    used, ids = codes.unique(return_inverse=True)
    return Text(ids[:split], ids[split:], "".join(map(chr, used.tolist())), hashlib.sha256(content).hexdigest())


def seed_with(*numbers: int) -> None:
    """Batches and dropout are functions of (seed, step, rank), so that a checkpoint needs no more of them than the step."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "little"))


def random_batch(ids: Tensor, o: argparse.Namespace, device: torch.device) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(ids) - o.sequence_length, (o.batch_size, 1))
    windows = ids[starts + torch.arange(o.sequence_length + 1)].to(device)
    return windows[:, :-1], windows[:, 1:]


# --- Network, processes, optimizer ------------------------------------------------------------------------------------


class Transformer(nn.Module):
    def __init__(self, vocabulary: int, length: int, width: int, depth: int, dropout: float) -> None:
        super().__init__()
        layer = functools.partial(nn.TransformerEncoderLayer, activation="gelu", batch_first=True, norm_first=True)
        self.characters, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(layer(width, width // HEAD, 4 * width, dropout) for _ in range(depth))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.characters(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=ids.device)
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.head(x)


def parallelize(model: Transformer, parallel: str) -> nn.Module:
    if parallel == "ddp":  # the search has DDP keep its first buckets: others, after a restart, would sum in another order
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def average_gradients(model: nn.Module, now: bool) -> contextlib.AbstractContextManager[Any]:
    """Around a micro-batch: only the last one's gradients, with all before added, are averaged over the processes."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
        return contextlib.nullcontext()
    return contextlib.nullcontext() if now else model.no_sync()


def make_optimizer(model: nn.Module, o: argparse.Namespace) -> torch.optim.Optimizer:
    groups = [dict(params=[p for p in model.parameters() if p.ndim >= 2], weight_decay=0.05),
              dict(params=[p for p in model.parameters() if p.ndim < 2], weight_decay=0.0)]  # biases and norms
    if o.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=o.lr)
    # An example is a sequence, not a character: characters of one sequence are no independent evidence about the weights.
    # They are counted over the whole step, micro-batches and processes, because its gradient is the mean over all of them.
    examples = o.batch_size * o.accumulate * dist.get_world_size()
    kind = {"adabayes": AdaBayes, "adabayes-fp": AdaBayesFP}[o.optimizer]
    return kind(groups, lr=o.lr, sgd_lr=o.sgd_lr, batch_size=examples, lean=o.lean, max_grad_norm=o.max_grad_norm)


def warmup_and_cosine(step: int, warmup: int, steps: int) -> float:
    return step / warmup if step < warmup else 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


# --- Checkpoints ------------------------------------------------------------------------------------------------------
# A folder gets its name, step-..., when it is complete and loses it before it is deleted; the file ``latest``, which names
# the one to go on from, is replaced in one move. So there is no moment at which a kill leaves half of anything.


class Run(NamedTuple):
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR

    def state(self, step: int) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer, options=FLAT)
        return {"model": model, "optimizer": optimizer, "scheduler": self.scheduler.state_dict(), "step": step}


def discard(checkpoint: Path) -> None:
    if checkpoint.exists():
        shutil.rmtree(checkpoint.rename(checkpoint.with_name(f".unfinished-{secrets.token_hex(8)}")))


def save(folder: Path, step: int, run: Run, settings: dict[str, Any]) -> None:
    """By all processes. Keeps this checkpoint and the one before."""
    final, agreed = folder / f"step-{step:08d}", [folder / f".unfinished-{secrets.token_hex(8)}"]
    dist.broadcast_object_list(agreed)
    dcp.save(run.state(step), checkpoint_id=agreed[0])  # returns once all have written
    if dist.get_rank() == 0:
        (agreed[0] / "settings.json").write_text(json.dumps(settings, indent=2))
        discard(final)  # of a run that was killed before ``latest`` named it
        agreed[0].rename(final)
        (folder / ".latest").write_text(final.name)
        os.replace(folder / ".latest", folder / "latest")
        for older in sorted(c for c in folder.glob("step-*") if c < final)[:-1]:
            discard(older)


def load(checkpoint: Path, run: Run) -> int:
    """By all processes. Returns how many steps the run has taken."""
    state = run.state(0)
    dcp.load(state, checkpoint_id=checkpoint)
    set_state_dict(run.model, run.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=FLAT)
    run.scheduler.load_state_dict(state["scheduler"])
    return state["step"]


def claim(folder: Path) -> Any:
    """Makes the folder this run's as long as the file it returns is open; clears what a killed run left."""
    folder.mkdir(parents=True, exist_ok=True)
    held = open(folder / "lock", "w")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Wrong(f"another run is writing into {folder}: end its processes, or give another --output") from None
    for left in folder.glob(".unfinished-*"):
        shutil.rmtree(left)
    return held


def newest(folder: Path, settings: dict[str, Any]) -> Path | None:
    """The checkpoint to go on from; None where there is none yet."""
    if not (folder / "latest").exists():
        return None
    checkpoint = folder / (folder / "latest").read_text()
    saved = json.loads((checkpoint / "settings.json").read_text())
    other = [f"{k} was {saved.get(k)}, now {settings.get(k)}" for k in {**saved, **settings} if saved.get(k) != settings.get(k)]
    if other:
        raise Wrong(f"{folder.parent} holds a run of other settings ({'; '.join(other)}): give those, or another --output")
    return checkpoint


# --- Training ---------------------------------------------------------------------------------------------------------


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    with torch.autocast(inputs.device.type, torch.bfloat16):
        return cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def train(run: Run, text: Text, o: argparse.Namespace, device: torch.device, done: int, settings: dict[str, Any]) -> None:
    rank, world, console = dist.get_rank(), dist.get_world_size(), Console()
    # What a killed run has logged beyond its last checkpoint, tensorboard leaves out.
    writer = SummaryWriter(str(o.output / "logs"), purge_step=done + 1) if rank == 0 else None
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    run.model.train()
    with Progress(*columns, console=console, disable=rank != 0 or not console.is_terminal) as progress:
        bar, logged, since = progress.add_task("", total=o.steps, completed=done), done, time.perf_counter()
        for step in range(done, o.steps):
            seed_with(o.seed, step, rank)
            loss = torch.zeros((), device=device)
            for micro in range(o.accumulate):
                inputs, targets = random_batch(text.train, o, device)
                with average_gradients(run.model, micro == o.accumulate - 1):
                    part = loss_of(run.model, inputs, targets) / o.accumulate
                    part.backward()
                loss += part.detach()
            adamw, lr = o.optimizer == "adamw", run.scheduler.get_last_lr()[0]
            norm = nn.utils.clip_grad_norm_(run.model.parameters(), o.max_grad_norm) if adamw else None
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.scheduler.step()
            done = step + 1
            progress.update(bar, completed=done)
            if done % o.log_every == 0 or done == o.steps:
                dist.all_reduce(loss)
                norm = run.optimizer.grad_norm if norm is None else norm.full_tensor() if hasattr(norm, "full_tensor") else norm
                scalars = {"loss": loss.item() / world, "lr": lr, "grad_norm": norm.item()}
                tokens = (done - logged) * o.batch_size * o.sequence_length * o.accumulate * world
                scalars["tokens_per_second"] = tokens / (time.perf_counter() - since)
                if not adamw:  # every process has to ask: the shares are those of all weights
                    overall = diagnostics(run.optimizer).overall
                    regimes = {name: getattr(overall, name) for name in ("sgd_like", "adam_like", "distance")}
                    scalars |= {f"regime/{name}": value for name, value in regimes.items() if value is not None}
                if writer:
                    for name, value in scalars.items():
                        writer.add_scalar(name, value, done)
                    line = "loss {loss:.4f}  lr {lr:.2e}  {tokens_per_second:,.0f} tokens/s".format(**scalars)
                    progress.update(bar, description=line)
                    if progress.disable:
                        print(f"step {done}  {line}", flush=True)
                logged, since = done, time.perf_counter()
            if done % o.save_every == 0 or done == o.steps:
                if writer:
                    writer.flush()  # the curves reach as far as the checkpoint
                save(o.output / "checkpoints", done, run, settings)


@torch.no_grad()
def validate(model: nn.Module, text: Text, o: argparse.Namespace, device: torch.device) -> float:
    """The mean loss of windows of the validation text, as many in each process: under FSDP2 they compute in step."""
    model.eval()
    windows, world = text.validation.unfold(0, o.sequence_length + 1, o.sequence_length), dist.get_world_size()
    mine = windows[dist.get_rank() : len(windows) // world * world : world] if len(windows) >= world else windows
    parts = mine.to(device).split(o.batch_size)[:100]
    total = sum(loss_of(model, part[:, :-1], part[:, 1:]) * len(part) for part in parts) / sum(map(len, parts))
    dist.all_reduce(total)
    return total.item() / world


@torch.no_grad()
def sample(model: nn.Module, text: Text, o: argparse.Namespace, device: torch.device) -> str:
    """200 characters; every process draws the same, in step."""
    model.eval()
    seed_with(o.seed)
    ids = text.validation[None, :1]
    for _ in range(200):
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(ids[:, -o.sequence_length :].to(device))[:, -1]
        ids = torch.cat([ids, logits.float().softmax(-1).cpu().multinomial(1)], 1)
    return "".join(text.vocabulary[i] for i in ids[0])


def weights_sha256(model: nn.Module) -> str:
    """On rank 0, of all weights: runs that print the same have the same, bit for bit."""
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return hashlib.sha256(b"".join(name.encode() + w.contiguous().numpy().tobytes() for name, w in sorted(whole.items()))).hexdigest()


# --- Options and start ------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise Wrong(f"{message} (--help lists the options)")


def above_zero(kind: Callable[[str], float]) -> Callable[[str], float]:
    def convert(text: str) -> float:
        if not 0 < kind(text) < math.inf:
            raise ValueError
        return kind(text)

    convert.__name__ = f"{kind.__name__} above 0"  # argparse's messages say it
    return convert


def parse(argv: list[str] | None) -> argparse.Namespace:
    count, number = above_zero(int), above_zero(float)
    parser = Parser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    add = functools.partial(parser.add_argument, metavar="")
    parser.add_argument("text", type=Path, help="the file to learn, UTF-8")
    parser.add_argument("--parallel", choices=("ddp", "fsdp2"), default="ddp")
    parser.add_argument("--optimizer", choices=("adabayes", "adabayes-fp", "adamw"), default="adabayes")
    parser.add_argument("--lean", action="store_true", help="AdaBayes with AdamW's memory: the same weights")
    add("--output", type=Path, default=Path("runs/lm"), help="checkpoints and logs; the run that is there goes on")
    add("--lr", type=number, default=1e-3)
    add("--sgd-lr", type=number, default=0.1, help="AdaBayes's")
    add("--max-grad-norm", type=number, default=1.0)
    add("--warmup", type=count, default=100, help="steps in which lr rises from 0")
    add("--steps", type=count, default=1000)
    add("--batch-size", type=count, default=16, help="sequences of a micro-batch of a process")
    add("--accumulate", type=count, default=1, help="micro-batches of a step")
    add("--sequence-length", type=count, default=128)
    add("--width", type=count, default=128, help=f"a multiple of {HEAD}")
    add("--depth", type=count, default=4)
    add("--dropout", type=float, default=0.1)
    add("--seed", type=int, default=0)
    add("--save-every", type=count, default=100)
    add("--log-every", type=count, default=10)
    options = parser.parse_args(argv)
    if options.width % HEAD:
        raise Wrong(f"--width {options.width} is not a multiple of {HEAD}")
    if not 0 <= options.dropout < 1:
        raise Wrong(f"--dropout {options.dropout} is not in [0, 1)")
    if options.lean and options.optimizer == "adamw":
        raise Wrong("--lean is for AdaBayes: leave it out with --optimizer adamw")
    return options


def choose_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    rank, processes = (int(os.environ.get(f"LOCAL_{name}", default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if processes > torch.cuda.device_count():
        raise Wrong(f"{processes} processes and {torch.cuda.device_count()} GPUs: start as many processes, or set CUDA_VISIBLE_DEVICES=")
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def on_all(check: Callable[..., Any], *args: Any) -> Any:
    """check(*args). What is wrong in any process is told once and ends all of them, so that none waits for another."""
    result, wrong = None, None
    try:
        result = check(*args)
    except (Wrong, OSError) as error:
        wrong = f"train_lm.py: error: {error}"
    told: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, wrong)
    if any(told):
        if dist.get_rank() == 0:
            print(*dict.fromkeys(filter(None, told)), sep="\n", file=sys.stderr, flush=True)
        dist.barrier()  # as the first one ends, torchrun ends the others
        sys.exit(2)
    return result


def main(argv: list[str] | None = None) -> None:
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)  # else torchrun says
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", **alone)
    torch.use_deterministic_algorithms(True)
    o, device = on_all(parse, argv), on_all(choose_device)
    text = on_all(read_text, o.text, o.sequence_length)
    settings = {name: value for name, value in vars(o).items() if name not in FREE}
    settings |= {"processes": dist.get_world_size(), "text_sha256": text.sha256}
    held = on_all(lambda: claim(o.output / "checkpoints") if dist.get_rank() == 0 else None)
    checkpoint = on_all(newest, o.output / "checkpoints", settings)

    torch.manual_seed(o.seed)  # the same initial weights in every process
    model = Transformer(len(text.vocabulary), o.sequence_length, o.width, o.depth, o.dropout).to(device)
    model = parallelize(model, o.parallel)
    optimizer = make_optimizer(model, o)
    schedule = functools.partial(warmup_and_cosine, warmup=o.warmup, steps=o.steps)
    run = Run(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule))
    done = load(checkpoint, run) if checkpoint else 0
    if checkpoint and dist.get_rank() == 0:
        print(f"Going on from {checkpoint}", flush=True)
    train(run, text, o, device, done, settings)
    loss, written, digest = validate(model, text, o, device), sample(model, text, o, device), weights_sha256(model)
    if dist.get_rank() == 0:
        print(f"{written}\n\nvalidation loss {loss:.4f}\nsha256 of the weights {digest}")
        held.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
