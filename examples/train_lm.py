"""A run that survives: a small transformer learns a text character by character, in one process or many.

    torchrun --standalone --nproc_per_node 2 examples/train_lm.py text.txt --output runs/lm
    python examples/train_lm.py text.txt --output runs/lm

Processes talk over NCCL where there are GPUs, else over gloo. Whenever it was killed, while it saved too, the same command
goes on from the last checkpoint and ends with the weights of a run that nobody disturbed, bit for bit on the same machine.
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
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.tensorboard import SummaryWriter

from adabayes_fused import AdaBayes, AdaBayesFP, diagnostics

NUMBERS = {
    "lr": (1e-3, "learning rate, after the warm-up"), "sgd_lr": (10.0, "AdaBayes's"), "max_grad_norm": (1.0, "gradients' norm"),
    "steps": (1000, "steps"), "warmup": (100, "steps in which lr rises from 0"), "accumulate": (1, "micro-batches of a step"),
    "batch_size": (16, "sequences of a micro-batch, of one process"), "sequence_length": (128, "characters"),
    "width": (128, "of the transformer, a multiple of 32"), "depth": (4, "layers"),
    "save_every": (100, "steps"), "log_every": (10, "steps"),
}  # fmt: skip
FREE = ("text", "output", "parallel", "save_every", "log_every")  # may change when a run goes on; all else makes another run
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Wrong(Exception):
    """What the user can put right; its text says how."""


# --- Text and network


class Text(NamedTuple):
    train: Tensor  # characters as indices into the vocabulary
    validation: Tensor  # the last tenth of them
    vocabulary: str
    sha256: str


def read_text(path: Path, length: int) -> Text:
    content = path.read_bytes()
    try:
        used, ids = torch.tensor([*map(ord, content.decode())]).unique(return_inverse=True)
    except UnicodeDecodeError as error:
        raise Wrong(f"{path} is not UTF-8 text: {error}") from None
    train, validation = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]
    if len(validation) <= length:
        raise Wrong(f"{path} is too short: the last tenth of its {len(ids):,} characters is for validation, and has to have "
                    f"--sequence-length + 1 = {length + 1:,} of them; give a longer text or a shorter length")  # fmt: skip
    return Text(train, validation, "".join(map(chr, used.tolist())), hashlib.sha256(content).hexdigest())


def seed_with(*numbers: int) -> None:
    """Batches and dropout are functions of (seed, step, rank), so that a checkpoint needs no more of them than the step."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "little"))


def random_batch(ids: Tensor, o: argparse.Namespace, device: torch.device) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(ids) - o.sequence_length, (o.batch_size, 1))
    windows = ids[starts + torch.arange(o.sequence_length + 1)].to(device)
    return windows[:, :-1], windows[:, 1:]


class Transformer(nn.Module):
    def __init__(self, vocabulary: int, length: int, width: int, depth: int, dropout: float) -> None:
        super().__init__()
        layer = functools.partial(nn.TransformerEncoderLayer, activation="gelu", batch_first=True, norm_first=True)
        self.characters, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(layer(width, width // 32, 4 * width, dropout) for _ in range(depth))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary))

    def forward(self, ids: Tensor) -> Tensor:
        """Logits for each next character, (all characters of all sequences, vocabulary)."""
        x = self.characters(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=ids.device)
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.head(x.flatten(0, 1))


def parallelize(model: Transformer, parallel: str) -> nn.Module:
    if parallel == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def make_optimizer(model: nn.Module, o: argparse.Namespace) -> torch.optim.Optimizer:
    groups = [dict(params=[p for p in model.parameters() if p.ndim >= 2], weight_decay=0.05),
              dict(params=[p for p in model.parameters() if p.ndim < 2], weight_decay=0.0)]  # biases and norms  # fmt: skip
    if o.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=o.lr)
    # The terms that a step's mean loss averages over are characters, of all micro-batches and processes.
    # sgd_lr: at the paper's 0.1 the gradients here leave 99.9 % of weights to SGD; at 10 four fifths are Adam's.
    characters = o.batch_size * o.sequence_length * o.accumulate * dist.get_world_size()
    kind = {"adabayes": AdaBayes, "adabayes-fp": AdaBayesFP}[o.optimizer]
    return kind(groups, lr=o.lr, sgd_lr=o.sgd_lr, batch_size=characters, lean=o.lean, max_grad_norm=o.max_grad_norm)


# --- Checkpoints: a folder is called step-... from when it is complete until before it is deleted, and the file ``latest``,
# which names the one to go on from, is replaced in one move: at no moment does a kill leave half of anything.


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


def claim(folder: Path) -> None:
    """Makes the folder this run's until its first process ends; clears what a killed run left."""
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Wrong(f"another run is writing into {folder}: end its processes, or give another --output") from None
        for left in folder.glob(".unfinished-*"):
            shutil.rmtree(left)


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


# --- Training


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    with torch.autocast(inputs.device.type, torch.bfloat16):
        return cross_entropy(model(inputs), targets.flatten())


def train(run: Run, text: Text, o: argparse.Namespace, device: torch.device, done: int, save_at: Callable[[int], None]) -> None:
    (model, optimizer, scheduler), rank, world, console = run, dist.get_rank(), dist.get_world_size(), Console()
    fsdp, adamw = o.parallel == "fsdp2", o.optimizer == "adamw"
    # What a killed run has logged beyond its last checkpoint, tensorboard leaves out.
    writer = SummaryWriter(str(o.output / "logs"), purge_step=done + 1) if rank == 0 else None
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    model.train()
    loss_of(model, *random_batch(text.train, o, device)).backward()  # DDP lays out its buckets anew after its first pass, and
    optimizer.zero_grad()  # sums over three or more depend on them: thus a step's are the same wherever the run began
    with Progress(*columns, console=console, disable=rank != 0 or not console.is_terminal) as progress:
        bar, tokens, since = progress.add_task("", total=o.steps, completed=done), 0, time.perf_counter()
        for step in range(done, o.steps):
            seed_with(o.seed, step, rank)
            loss = torch.zeros((), device=device)
            for micro in range(o.accumulate):
                last = micro == o.accumulate - 1  # its pass averages the gradients of all over the processes
                if fsdp:
                    model.set_requires_gradient_sync(last)
                with contextlib.nullcontext() if fsdp or last else model.no_sync():
                    part = loss_of(model, *random_batch(text.train, o, device)) / o.accumulate
                    part.backward()
                loss += part.detach()
            norm = nn.utils.clip_grad_norm_(model.parameters(), o.max_grad_norm) if adamw else None  # AdaBayes does in step()
            optimizer.step()
            optimizer.zero_grad()
            lr, done = scheduler.get_last_lr()[0], step + 1
            scheduler.step()
            progress.update(bar, completed=done)
            tokens += world * o.accumulate * o.batch_size * o.sequence_length
            if done % o.log_every == 0 or done == o.steps:
                dist.all_reduce(loss)
                norm = optimizer.grad_norm if norm is None else norm.full_tensor() if fsdp else norm
                speed = tokens / (time.perf_counter() - since)
                scalars = {"loss": loss.item() / world, "lr": lr, "grad_norm": norm.item(), "tokens_per_second": speed}
                scalars |= {} if adamw else regimes(optimizer)
                if writer:
                    for name, value in scalars.items():
                        writer.add_scalar(name, value, done)
                    line = f"loss {scalars['loss']:.4f}  lr {lr:.2e}  {speed:,.0f} tokens/s"
                    progress.update(bar, description=line)
                    if progress.disable:
                        print(f"step {done}  {line}", flush=True)
                tokens, since = 0, time.perf_counter()
            if done % o.save_every == 0 or done == o.steps:
                if writer:
                    writer.flush()  # the curves reach as far as the checkpoint
                save_at(done)


def regimes(optimizer: Any) -> dict[str, float]:
    """Where AdaBayes stands between SGD and Adam, over all weights: every process has to ask."""
    _, _, *figures = diagnostics(optimizer).overall
    names = ("regime/sgd_like", "regime/adam_like", "regime/distance")
    return {name: figure for name, figure in zip(names, figures, strict=True) if figure is not None}


@torch.no_grad()
def validate(model: nn.Module, text: Text, o: argparse.Namespace, device: torch.device) -> float:
    """The mean loss of windows of the validation text, as many in each process: under FSDP2 they compute in step."""
    windows, world = text.validation.unfold(0, o.sequence_length + 1, o.sequence_length), dist.get_world_size()
    mine = windows[dist.get_rank() : len(windows) // world * world : world] if len(windows) >= world else windows
    parts = mine.to(device).split(o.batch_size)[:100]
    total = sum(loss_of(model, part[:, :-1], part[:, 1:]) * len(part) for part in parts) / sum(map(len, parts))
    dist.all_reduce(total)
    return total.item() / world


@torch.no_grad()
def sample(model: nn.Module, text: Text, o: argparse.Namespace, device: torch.device) -> str:
    """Every process draws the same, in step."""
    seed_with(o.seed)
    ids = text.validation[None, :1]
    for _ in range(200):
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(ids[:, -o.sequence_length :].to(device))[-1:]
        ids = torch.cat([ids, logits.float().softmax(-1).cpu().multinomial(1)], 1)
    return "".join(text.vocabulary[i] for i in ids[0])


def weights_sha256(model: nn.Module) -> str:
    """On rank 0, of all weights: runs that print the same have the same, bit for bit."""
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return hashlib.sha256(b"".join(name.encode() + w.numpy().tobytes() for name, w in sorted(whole.items()))).hexdigest()


# --- Options and start


def parse(argv: list[str] | None) -> argparse.Namespace:
    def wrong(message: str) -> Any:
        raise Wrong(f"{message} (--help lists the options)")

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.error = wrong  # type: ignore[method-assign]
    parser.add_argument("text", type=Path, help="the file to learn, UTF-8")
    parser.add_argument("--output", type=Path, default=Path("runs/lm"), help="checkpoints and logs; a run that is there goes on")
    parser.add_argument("--parallel", choices=("ddp", "fsdp2"), default="ddp")
    parser.add_argument("--optimizer", choices=("adabayes", "adabayes-fp", "adamw"), default="adabayes")
    parser.add_argument("--lean", action="store_true", help="AdaBayes with AdamW's memory: the same weights")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    for name, (value, what) in NUMBERS.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value, metavar="N", help=f"{what}; {value}")
    o = parser.parse_args(argv)
    for name in NUMBERS:
        if not 0 < getattr(o, name) < math.inf:
            wrong(f"--{name.replace('_', '-')} {getattr(o, name)} is not above 0")
    if o.width % 32:
        wrong(f"--width {o.width} is not a multiple of 32, the width of an attention head")
    if not 0 <= o.dropout < 1:
        wrong(f"--dropout {o.dropout} is not in [0, 1)")
    if o.lean and o.optimizer == "adamw":
        wrong("--lean is for AdaBayes, not for --optimizer adamw")
    return o


def start_processes() -> None:
    """As torchrun says, or this process alone."""
    store, rank, world = next(dist.rendezvous("env://")) if "RANK" in os.environ else (dist.HashStore(), 0, 1)
    if world == int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        # torchrun's store still has the addresses of workers that it has restarted: each attempt gets its own part of it. The
        # count is one machine's; for several, tell torchrun TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (pytorch issue 135712).
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


def choose_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
        raise Wrong(f"more processes than the {torch.cuda.device_count()} GPUs: start as many, or set CUDA_VISIBLE_DEVICES=")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    torch.use_deterministic_algorithms(True)  # what runs here on CPUs is so anyway
    return torch.device("cuda", torch.cuda.current_device())


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
    start_processes()
    o, device = on_all(parse, argv), on_all(choose_device)
    text, folder = on_all(read_text, o.text, o.sequence_length), o.output / "checkpoints"
    settings = {name: value for name, value in vars(o).items() if name not in FREE}
    settings |= {"processes": dist.get_world_size(), "text_sha256": text.sha256}
    on_all(claim, folder)
    checkpoint = on_all(newest, folder, settings)

    def warmup_and_cosine(step: int) -> float:
        rest = (step - o.warmup) / max(1, o.steps - o.warmup)
        return step / o.warmup if step < o.warmup else 0.5 + 0.5 * math.cos(math.pi * rest)

    torch.manual_seed(o.seed)  # the same initial weights in every process
    model = Transformer(len(text.vocabulary), o.sequence_length, o.width, o.depth, o.dropout).to(device)
    model = parallelize(model, o.parallel)
    optimizer = make_optimizer(model, o)
    run = Run(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_and_cosine))
    done = load(checkpoint, run) if checkpoint else 0
    train(run, text, o, device, done, lambda step: save(folder, step, run, settings))
    model.eval()
    loss, written, digest = validate(model, text, o, device), sample(model, text, o, device), weights_sha256(model)
    if dist.get_rank() == 0:
        print(f"{written}\n\nvalidation loss {loss:.4f}\nsha256 of the weights {digest}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
