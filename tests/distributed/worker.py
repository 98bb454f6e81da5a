"""What runs in each process of ``test_distributed.py``: the cases named on the command line, one after the other.

    python -m torch.distributed.run --standalone --nproc_per_node 2 tests/distributed/worker.py FOLDER CASE...

Each process writes what its cases return to FOLDER/CASE.RANK.json; the tests judge it.
"""

import copy
import inspect
import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adabayes_fused import AdaBayes, AdaBayesFP, diagnostics, posterior, prepare, slabs, stepper

OPTIMIZERS = {
    "AdaBayes": (AdaBayes, dict(batch_size=12)),
    "AdaBayes-lean": (AdaBayes, dict(batch_size=12, lean=True)),
    "AdaBayesFP": (AdaBayesFP, {}),
    "AdaBayesFP-lean": (AdaBayesFP, dict(lean=True)),
}
CODED = {  # rounded by random numbers that are the whole tensor's
    "AdaBayes-8bit": (AdaBayes, dict(batch_size=12, lean=True, state_dtype="8bit", seed=5)),
    "AdaBayesFP-bfloat16": (AdaBayesFP, dict(state_dtype="bfloat16", seed=5)),
}
SAVED = ("AdaBayes", "AdaBayesFP-lean", *CODED)
CLIP = dict(max_grad_norm=0.05, skip_nonfinite=True)
BATCH = 12  # which 1, 2, 3 and 4 processes share evenly
FOLDER = Path()


def rank():
    return dist.get_rank()


def world():
    return dist.get_world_size()


class Net(nn.Module):
    """Odd sizes: 3 x 5 and 1 x 7, and of one element first, in the middle and last, of which most processes hold nothing."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Parameter(torch.ones(1))
        self.a = nn.Linear(5, 3)
        self.middle = nn.Parameter(torch.ones(1))
        self.b = nn.Linear(3, 7)
        self.c = nn.Linear(7, 1)

    def forward(self, x):
        return self.c(self.b(self.a(x * self.first).tanh() * self.middle).tanh())


def parameters(net):
    """With nothing of it here first, in the middle and last."""
    net = getattr(net, "module", net)
    return [net.first, *net.a.parameters(), net.middle, *net.b.parameters(), *net.c.parameters()]


def sharded(net=None, mesh=None, **options):
    net = net or Net()
    mesh = mesh or init_device_mesh("cpu", (world(),))
    for layer in (net.a, net.b, net.c):
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(net, mesh=mesh, **options)


def make(name, params, **policy):
    kind, options = (OPTIMIZERS | CODED)[name]
    return kind(params, lr=1e-2, **options, **policy)


def batch(t, share=True):
    """Step ``t``'s examples: this process's share of them, or all."""
    x = torch.randn(BATCH, 5, generator=torch.Generator().manual_seed(t))
    return x.chunk(world())[rank()] if share else x


def backward(net, x):
    for p in net.parameters():
        p.grad = None
    net(x).float().add(x.sum(1, keepdim=True).sin()).square().mean().backward()


def whole(t):
    """In memory of its own: the whole of what is replicated is its local part."""
    return (t.full_tensor() if isinstance(t, DTensor) else t).clone()


@torch.no_grad()
def everything(optimizer, params):
    """Whole weights, state and step counts, wherever their parts are."""
    return [whole(t.detach()) for p in params for t in (p, *optimizer.state[p].values())]


def bits(ours, theirs):
    """How many of these tensors differ in a bit."""
    assert len(ours) == len(theirs)
    return sum(not torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@torch.no_grad()
def difference(params, others):
    pairs = zip(params, others, strict=True)
    return max((whole(p.detach()).float() - whole(q.detach()).float()).abs().max().item() for p, q in pairs)


def same_everywhere(t):
    """Whether every process has the bits of the first one's."""
    first = t.detach().clone()
    dist.broadcast(first, 0)
    return torch.equal(first, t.detach())


class Dispatches(TorchDispatchMode):
    """Counts operations on DTensors. A step that is watched leaves its ordinary way, so that it is not told."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.untold = [mock.patch.object(module, "watched", return_value=False) for module in (stepper, prepare, slabs)]

    def __enter__(self):
        for patch in self.untold:
            patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        for patch in self.untold:
            patch.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        if any(isinstance(a, DTensor) for a in tree_leaves((args, kwargs))):
            self.seen.append(str(f))
        return f(*args, **(kwargs or {}))


def follow(net, optimizer, steps, name, reference=None, **policy):
    """Trains; beside it a twin that is given the whole gradients, and a single process's run."""
    params = parameters(net)
    twin_params = [nn.Parameter(whole(p.detach())) for p in params]
    twin = make(name, twin_params, **policy)
    single_net = reference or Net()
    single = make(name, parameters(single_net), **policy)
    first = Dispatches(), Dispatches()
    norms = []
    for t in range(steps):
        backward(net, batch(t))
        for p, q in zip(params, twin_params, strict=True):
            q.grad = whole(p.grad)
        backward(single_net, batch(t, share=False))
        with first[t > 0]:
            optimizer.step()
        twin.step()
        single.step()
        if policy:
            norms.append(abs(optimizer.grad_norm.item() / twin.grad_norm.item() - 1))
    return {
        "bits": bits(everything(optimizer, params), everything(twin, twin_params)),
        "twin": difference(params, twin_params),
        "single": difference(params, parameters(single_net)),
        "moved": difference(params, parameters(Net())),
        "norm": max(norms, default=0.0),
        "clipped": bool(norms) and optimizer.grad_norm.item() > policy["max_grad_norm"],
        "first": first[0].seen,
        "later": first[1].seen,
        "shapes": [list(p._local_tensor.shape) for p in params if isinstance(p, DTensor)],
        "placed": all(placed(s, p) for p in params for s in optimizer.state[p].values() if s.dim()),
    }


def placed(t, p):
    """Whether ``t`` is what ``p`` is: type, mesh, placements, shape, stride, and the part that is here."""
    if not isinstance(p, DTensor):
        return type(t) is torch.Tensor and t.shape == p.shape
    return (
        isinstance(t, DTensor)
        and (t.device_mesh, t.placements, t.shape, t.stride()) == (p.device_mesh, p.placements, p.shape, p.stride())
        and t._local_tensor.shape == p._local_tensor.shape
    )


# --- FSDP2 ------------------------------------------------------------------------------------------------------------


def case_fsdp2():
    """Both classes, lean and full, with and without clipping."""
    found = {}
    for name in OPTIMIZERS:
        for clip in (False, True):
            policy = CLIP if clip else {}
            net = sharded()
            found[f"{name}{' clipped' if clip else ''}"] = follow(net, make(name, parameters(net), **policy), 20, name, **policy)
    for name in CODED:
        net = sharded()
        found[name] = follow(net, make(name, parameters(net)), 20, name)
    return found


def case_overflow():
    """A NaN in the part of one process alone, in turn; then none."""
    found = []
    for at in range(world()):
        net = sharded()
        params = parameters(net)
        optimizer = make("AdaBayes", params, **CLIP)
        backward(net, batch(0))
        optimizer.step()
        before = everything(optimizer, params)
        backward(net, batch(1))
        if rank() == at:
            params[1].grad._local_tensor.view(-1)[-1:].fill_(float("nan"))
        optimizer.step()
        skipped = bits(everything(optimizer, params), before), int(optimizer.skipped_steps)
        backward(net, batch(1))
        optimizer.step()
        found.append([*skipped, bits(everything(optimizer, params), before), int(optimizer.skipped_steps)])
    return found


def case_warm_up_from_zero():
    """The first step at lr = 0, and zero gradients in the part of the last process alone: it counts in each."""
    net = sharded()
    params = parameters(net)
    optimizer = make("AdaBayes", params)
    optimizer.param_groups[0]["lr"] = 0.0
    backward(net, batch(0))
    if rank() == world() - 1:
        for p in params:
            p.grad._local_tensor.zero_()
    optimizer.step()
    return [float(optimizer.state[p]["step"]) if optimizer.state[p] else None for p in params]


def case_mixed_precision():
    """bfloat16 where it computes, float32 where it is kept; then bfloat16 parameters with gradients reduced in float32."""
    found = {}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        net = sharded(Net().to(dtype), mp_policy=policy)
        params = parameters(net)
        twin_params = [nn.Parameter(whole(p.detach())) for p in params]
        optimizer, twin = make("AdaBayes", params), make("AdaBayes", twin_params)
        for t in range(10):
            backward(net, batch(t))
            for p, q in zip(params, twin_params, strict=True):
                q.grad = whole(p.grad)
            optimizer.step()
            twin.step()
        state = optimizer.state[params[1]]["exp_avg"]
        found[str(dtype)] = {
            "bits": bits(everything(optimizer, params), everything(twin, twin_params)),
            "moved": difference(params, parameters(Net())),
            "state": str(state.dtype),
        }
    return found


def case_mixed_meshes():
    """Two models on meshes of other shapes and a plain one, in one optimizer; the plain one's norm counts once."""
    n = world()
    nets = [sharded(), sharded(mesh=init_device_mesh("cpu", (1, n), mesh_dim_names=("replicate", "shard"))), Net()]
    params = [p for net in nets for p in parameters(net)]
    twin_params = [nn.Parameter(whole(p.detach())) for p in params]
    found = {}
    for clip in (False, True):
        policy = CLIP if clip else {}
        optimizer, twin = make("AdaBayesFP", params, **policy), make("AdaBayesFP", twin_params, **policy)
        dispatched = Dispatches()
        for t in range(5):
            for net in nets:
                backward(net, batch(t, share=net is not nets[2]))
            for p, q in zip(params, twin_params, strict=True):
                q.grad = whole(p.grad)
            optimizer.step() if t == 0 else run_in(dispatched, optimizer.step)
            twin.step()
        found[f"clipped {clip}"] = {
            "twin": difference(params, twin_params),
            "norm": abs(optimizer.grad_norm.item() / twin.grad_norm.item() - 1) if clip else 0.0,
            "dispatched": dispatched.seen,
        }
    return found


def run_in(context, f):
    with context:
        return f()


def case_mixed_paths():
    """Of parameters sharded over rows and over columns of four processes, one's gradients have gaps in two processes alone, so
    that there the other's are read first: nobody waits for those who wait for him, and each sum is over its group."""
    mesh = init_device_mesh("cpu", (2, world() // 2), mesh_dim_names=("a", "b"))
    places = [Shard(0), Replicate()], [Replicate(), Shard(0)]
    torch.manual_seed(0)
    twin_params = [nn.Parameter(torch.randn(5, 3)) for _ in places]
    params = [nn.Parameter(distribute_tensor(p.detach(), mesh, at)) for p, at in zip(twin_params, places, strict=True)]
    optimizer, twin = make("AdaBayesFP", params, **CLIP), make("AdaBayesFP", twin_params, **CLIP)
    for _ in range(3):
        for p, q, at in zip(params, twin_params, places, strict=True):
            q.grad = torch.randn(5, 3)
            p.grad = distribute_tensor(q.grad, mesh, at)
        if rank() in (0, 3):
            part = params[0].grad._local_tensor
            params[0].grad._local_tensor = torch.stack([part, part], -1)[..., 0]
        optimizer.step()
        twin.step()
    return {"twin": difference(params, twin_params), "norm": abs(optimizer.grad_norm.item() / twin.grad_norm.item() - 1)}


def case_hsdp():
    """Replicated over two, sharded over two: the norm counts each part once."""
    mesh = init_device_mesh("cpu", (2, world() // 2), mesh_dim_names=("replicate", "shard"))
    found = {}
    for name in ("AdaBayes", "AdaBayesFP-lean"):
        net = sharded(mesh=mesh)
        optimizer = make(name, parameters(net), **CLIP)
        found[name] = follow(net, optimizer, 10, name, **CLIP)
        found[name]["replicas"] = [same_on_replicas(p, mesh) for p in parameters(net)]
    for name in CODED:
        net = sharded(mesh=mesh)
        found[name] = follow(net, make(name, parameters(net)), 10, name)
        found[name]["replicas"] = [same_on_replicas(p, mesh) for p in parameters(net)]
    return found


def same_on_replicas(p, mesh):
    part = p.detach()._local_tensor
    first = part.clone()
    group = mesh.get_group("replicate")
    dist.broadcast(first, dist.get_global_rank(group, 0), group=group)
    return torch.equal(first, part)


def case_scaler():
    """GradScaler: its overflow flag is of all processes; no step there, a step of unscaled gradients else."""
    found = {}
    for clip in (False, True):
        policy = dict(max_grad_norm=0.05) if clip else {}
        net = sharded()
        params = parameters(net)
        single_net = Net()
        optimizer, single = make("AdaBayes", params, **policy), make("AdaBayes", parameters(single_net), **policy)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for t in range(6):
            x = batch(t)
            optimizer.zero_grad()
            scaler.scale(net(x).square().mean()).backward()
            if t == 2 and rank() == 0:
                params[1].grad._local_tensor[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            if t != 2:
                single.zero_grad()
                single_net(batch(t, share=False)).square().mean().backward()
                single.step()
        found[f"clipped {clip}"] = {
            "single": difference(params, parameters(single_net)),
            "scale": scaler.get_scale(),
            "steps": [float(optimizer.state[p]["step"]) for p in params],
            "skipped": int(optimizer.skipped_steps),
        }
    return found


# --- Whole parameters in each process ---------------------------------------------------------------------------------


def case_ddp():
    """Gradients that are views at odd places of a bucket; replicas stay the same bit for bit."""
    found = {}
    for name, clip in (("AdaBayes", False), ("AdaBayes", True), ("AdaBayes-8bit", False)):
        for views in (False, True):
            policy = CLIP if clip else {}
            net = nn.parallel.DistributedDataParallel(Net(), gradient_as_bucket_view=views, bucket_cap_mb=1)
            optimizer = make(name, net.parameters(), **policy)
            single_net = Net()
            single = make(name, single_net.parameters(), **policy)
            for t in range(20):
                optimizer.zero_grad(set_to_none=not views)
                net(batch(t)).square().mean().backward()
                single.zero_grad()
                single_net(batch(t, share=False)).square().mean().backward()
                optimizer.step()
                single.step()
            params = list(net.parameters())
            found[f"{name}, clipped {clip}, views {views}"] = {
                "single": difference(params, single_net.parameters()),
                "replicas": all(same_everywhere(t) for p in params for t in (p, *optimizer.state[p].values())),
                "offsets": sorted({p.grad.data_ptr() % 16 for p in params}),
            }
    return found


def case_fsdp1():
    """FullyShardedDataParallel: flat parameters and the original ones; of the flat ones the whole state, saved and loaded.

    Of the original ones, optim_state_dict mixes up the slots on the CPU, of torch's Adam too.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp import StateDictType

    def weights(net):
        with FSDP.summon_full_params(net):
            return {name: p.detach().clone() for name, p in net.module.named_parameters()}

    def wrapped(original):
        return FSDP(Net(), use_orig_params=original, device_id=torch.device("cpu"))

    found = {}
    for name, original in (("AdaBayes", False), ("AdaBayes", True), ("AdaBayesFP-bfloat16", False)):
        net, single_net = wrapped(original), Net()
        optimizer, single = make(name, net.parameters()), make(name, single_net.parameters())
        train(net, optimizer, range(10))
        for t in range(10):
            backward(single_net, batch(t, share=False))
            single.step()
        ours, theirs = weights(net), dict(single_net.named_parameters())
        found[f"{name}, original {original}"] = result = {
            "single": max((ours[key] - p).abs().max().item() for key, p in theirs.items()),
            "refused": "",
        }
        try:
            make("AdaBayes", net.parameters(), max_grad_norm=1.0).step()
        except RuntimeError as error:
            result["refused"] = str(error)
        if original:
            continue
        other = wrapped(original)
        with FSDP.state_dict_type(net, StateDictType.FULL_STATE_DICT), FSDP.state_dict_type(other, StateDictType.FULL_STATE_DICT):
            saved = copy.deepcopy(FSDP.optim_state_dict(net, optimizer))
            other.load_state_dict(copy.deepcopy(net.state_dict()))
            loaded = make(name, other.parameters())
            loaded.load_state_dict(FSDP.optim_state_dict_to_load(other, loaded, saved))
        result["state"] = max(
            (saved["state"][key][slot] - t).abs().max().item()
            for key, p in theirs.items()
            for slot, t in single.state[p].items()
            if t.is_floating_point()
        )
        train(net, optimizer, range(10, 13))
        train(other, loaded, range(10, 13))
        result["continued"] = bits(list(weights(net).values()), list(weights(other).values()))
    return found


def case_zero():
    """ZeroRedundancyOptimizer: one process's weights, its consolidated state loaded, a changed lr reaching the inside."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    found = {}
    for name in ("AdaBayes", "AdaBayesFP-lean", "AdaBayes-8bit"):
        for view in (False, True):
            kind, options = (OPTIMIZERS | CODED)[name]

            def zero(params):
                return ZeroRedundancyOptimizer(params, kind, parameters_as_bucket_view=view, lr=1e-2, **options)  # noqa: B023

            net = nn.parallel.DistributedDataParallel(Net())
            optimizer = zero(net.parameters())
            single_net = Net()
            single = make(name, single_net.parameters())

            def train(net, optimizer, steps):
                for t in steps:
                    for group in optimizer.param_groups:
                        group["lr"] = 1e-2 / (1 + t)
                    backward(net, batch(t))
                    optimizer.step()

            train(net, optimizer, range(10))
            for t in range(10):
                single.param_groups[0]["lr"] = 1e-2 / (1 + t)
                backward(single_net, batch(t, share=False))
                single.step()
            after = difference(net.parameters(), single_net.parameters())
            inner_lr = [group["lr"] for group in optimizer.optim.param_groups]
            weights = copy.deepcopy(net.state_dict())
            optimizer.consolidate_state_dict(to=0)
            saved = copy.deepcopy([optimizer.state_dict() if rank() == 0 else None])
            dist.broadcast_object_list(saved, 0)
            other = nn.parallel.DistributedDataParallel(Net())
            other.load_state_dict(weights)
            loaded = zero(other.parameters())
            loaded.load_state_dict(saved[0])
            train(net, optimizer, range(10, 15))
            train(other, loaded, range(10, 15))
            kept, again = (
                [v for group in one.optim.param_groups for p in group["params"] for v in one.optim.state[p].values()]
                for one in (optimizer, loaded)  # in the order of parameters: loading has another
            )
            found[f"{name}, view {view}"] = {
                "single": after,
                "lr": inner_lr,
                "saved": len(saved[0]["state"]),
                "continued": bits([p.detach() for p in net.parameters()], [p.detach() for p in other.parameters()]),
                "state": bits(kept, again),
                "here": len(optimizer.optim.state),
            }
    return found


# --- Tensor parallelism -----------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)

    def forward(self, x):
        return self.down(self.up(self.norm(x)).tanh())


def parallel(mesh):
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    plan = {
        "norm": SequenceParallel(),
        "up": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
        "down": RowwiseParallel(output_layouts=Replicate()),
    }
    block = parallelize_module(
        Block(), mesh, {**plan, "": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1))}
    )
    return parallelize_module(block, mesh, {"up": ColwiseParallel()})


def train_block(block, params, mesh_2d):
    single_block = Block()
    names = [n for n, _ in single_block.named_parameters()]
    found = {}
    for clip in (False, True):
        policy = CLIP if clip else {}
        twin_params = [nn.Parameter(whole(p.detach())) for p in params]
        single_block.load_state_dict(dict(zip(names, [whole(p.detach()) for p in params], strict=True)))
        optimizer, twin = make("AdaBayes", params, **policy), make("AdaBayes", twin_params, **policy)
        single = make("AdaBayes", single_block.parameters(), **policy)
        counts = Dispatches(), Dispatches()
        norm = 0.0
        for t in range(10):
            x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(t))
            part = x if mesh_2d is None else x.chunk(mesh_2d.size(0))[mesh_2d.get_local_rank(0)]
            for model, examples in ((block, part), (single_block, x)):
                model.zero_grad()
                model(examples).square().mean().backward()
            for p, q in zip(params, twin_params, strict=True):
                q.grad = whole(p.grad)
            run_in(counts[t > 0], optimizer.step)
            twin.step()
            single.step()
            norm = max(norm, abs(optimizer.grad_norm.item() / twin.grad_norm.item() - 1) if clip else 0.0)
        found[f"clipped {clip}"] = {
            "bits": bits(everything(optimizer, params), everything(twin, twin_params)),
            "twin": difference(params, twin_params),
            "single": difference(params, single_block.parameters()),
            "norm": norm,
            "first": counts[0].seen,
            "later": counts[1].seen,
            "placements": sorted({str(p.placements) for p in params}),
            "gradients": sorted({str(p.grad.placements) for p in params}),
            "placed": all(placed(s, p) for p in params for s in optimizer.state[p].values() if s.dim()),
        }
    return found


def case_tensor_parallel():
    """Columns, rows, and replicated norms whose gradients are sums still to be taken."""
    block = parallel(init_device_mesh("cpu", (world(),), mesh_dim_names=("tp",)))
    return train_block(block, list(block.parameters()), None)


def case_two_dimensions():
    """Tensor parallelism within FSDP2: strided shards."""
    mesh = init_device_mesh("cpu", (2, world() // 2), mesh_dim_names=("dp", "tp"))
    block = parallel(mesh["tp"])
    fully_shard(block, mesh=mesh["dp"])
    found = train_block(block, list(block.parameters()), mesh)
    found["loaded"] = load_parts(block, list(block.parameters()))
    return found


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def load_parts(net, params):
    """State given whole, or as the part that is here, as plain tensors: placed as the parameter, with the same bits."""
    optimizer = make("AdaBayes", params)
    net.zero_grad()
    net(torch.randn(4, 6, 8) if isinstance(net, Block) else batch(0)).square().mean().backward()
    optimizer.step()
    before = everything(optimizer, params)
    found = {}
    plain = {"whole": whole, "part": lambda t: t._local_tensor.clone() if isinstance(t, DTensor) else t.clone()}
    for form, take in plain.items():
        saved = optimizer.state_dict()
        saved["state"] = {i: {n: take(t) for n, t in entry.items()} for i, entry in saved["state"].items()}
        by_loading = make("AdaBayes", params)
        by_loading.load_state_dict(saved)
        direct = make("AdaBayes", params)
        for i, p in enumerate(params):
            direct.state[p].update({n: t.clone() for n, t in saved["state"][i].items()})
        kept = {p: p.detach().clone() for p in params}
        found[form] = [bits(everything(by_loading, params), before)]
        ends = []
        for each in (optimizer_copy(optimizer, params), by_loading, direct):
            with torch.no_grad():
                for p, value in kept.items():
                    p._local_tensor.copy_(value._local_tensor)
            each.step()
            ends.append(everything(each, params))
            found[form].append(all(placed(s, p) for p in params for s in each.state[p].values() if s.dim()))
        with torch.no_grad():
            for p, value in kept.items():
                p._local_tensor.copy_(value._local_tensor)
        found[form] += [bits(ends[0], ends[1]), bits(ends[0], ends[2])]
    return found


def optimizer_copy(optimizer, params):
    other = make("AdaBayes", params)
    other.load_state_dict(optimizer.state_dict())
    return other


def case_load_parts():
    net = sharded()
    return load_parts(net, parameters(net))


def train(net, optimizer, steps):
    for t in steps:
        backward(net, batch(t))
        optimizer.step()


def app(net, optimizer, **options):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    model, optim = get_state_dict(net, optimizer, options=StateDictOptions(**options) if options else None)
    return {"model": model, "optim": optim}


def put(net, optimizer, state, **options):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict

    options = StateDictOptions(**options) if options else None
    set_model_state_dict(net, state["model"], options=options)
    set_optimizer_state_dict(net, optimizer, state["optim"], options=options)


def case_save():
    """Five steps, saved in each form; five more, which who loads is to repeat."""
    import torch.distributed.checkpoint as dcp

    found, writers = {}, dist.new_group()  # who writes meanwhile speaks in a group of its own
    for name in SAVED:
        net = sharded()
        optimizer = make(name, net.parameters())
        train(net, optimizer, range(5))
        dcp.save(app(net, optimizer), checkpoint_id=FOLDER / f"{name}.dcp")
        dcp.save(app(net, optimizer, flatten_optimizer_state_dict=True), checkpoint_id=FOLDER / f"{name}.flat.dcp")
        writing = dcp.async_save(app(net, optimizer), checkpoint_id=FOLDER / f"{name}.async.dcp", process_group=writers)
        params = list(net.parameters())
        at_save = everything(optimizer, params)
        whole_state = copy.deepcopy(app(net, optimizer, full_state_dict=True, cpu_offload=True))
        train(net, optimizer, range(5, 10))  # while it is being written
        writing.result()
        at_end = everything(optimizer, params)
        if rank() == 0:
            torch.save(whole_state, FOLDER / f"{name}.whole.pt")
            torch.save({"at_save": at_save, f"after {world()}": at_end}, FOLDER / f"{name}.pt")
        found[name] = {"whole": len(whole_state["optim"].get("state", {}))}
    dist.barrier()
    return found


def case_load():
    """What two processes have saved, here: the same bits; trained on where as many go on, to the same bits."""
    import torch.distributed.checkpoint as dcp

    found = {}
    for name in SAVED:
        expected = torch.load(FOLDER / f"{name}.pt")
        for form in ("dcp", "flat.dcp", "async.dcp", "whole.pt"):
            net = sharded()
            optimizer = make(name, net.parameters())
            params = list(net.parameters())
            if form == "whole.pt":
                put(net, optimizer, torch.load(FOLDER / f"{name}.{form}"), full_state_dict=True)
            else:
                options = dict(flatten_optimizer_state_dict=True) if form == "flat.dcp" else {}
                state = app(net, optimizer, **options)
                dcp.load(state, checkpoint_id=FOLDER / f"{name}.{form}")
                put(net, optimizer, state, **options)
            result = {
                "at_save": bits(everything(optimizer, params), expected["at_save"]),
                "placed": all(placed(s, p) for p in params for s in optimizer.state[p].values() if s.dim()),
            }
            train(net, optimizer, range(5, 10))
            after = everything(optimizer, params)
            end = expected.get(f"after {world()}")
            result["after"] = bits(after, end) if end else 0
            found[f"{name} {form}"] = result
    return found


def case_load_plain():
    """In one process, into parameters that are no DTensors."""
    import torch.distributed.checkpoint as dcp

    found = {}
    for name in SAVED:
        expected = torch.load(FOLDER / f"{name}.pt")
        for form, options in (("dcp", {}), ("flat.dcp", dict(flatten_optimizer_state_dict=True)), ("whole.pt", {})):
            net = Net()
            optimizer = make(name, net.parameters())
            if form == "whole.pt":
                state = torch.load(FOLDER / f"{name}.{form}")
            else:
                state = app(net, optimizer, **options)
                dcp.load(state, checkpoint_id=FOLDER / f"{name}.{form}")
            put(net, optimizer, state, **options)
            params = list(net.parameters())
            found[f"{name} {form}"] = {
                "at_save": bits(everything(optimizer, params), expected["at_save"]),
                "placed": all(placed(s, p) for p in params for s in optimizer.state[p].values() if s.dim()),
                "after": 0,
            }
    return found


def case_whole_from_first():
    """The state of all, broadcast from the first process."""
    found = {}
    name = "AdaBayes"
    expected = torch.load(FOLDER / f"{name}.pt")
    net = sharded()
    optimizer = make(name, net.parameters())
    state = torch.load(FOLDER / f"{name}.whole.pt") if rank() == 0 else {"model": {}, "optim": {}}
    put(net, optimizer, state, full_state_dict=True, broadcast_from_rank0=True)
    found["at_save"] = bits(everything(optimizer, list(net.parameters())), expected["at_save"])
    return found


def case_reading():
    """posterior and diagnostics, over all parts."""
    net = sharded()
    params = parameters(net)
    optimizer = make("AdaBayes", params)
    train(net, optimizer, range(3))
    twin_params = [nn.Parameter(whole(p.detach())) for p in params]
    twin = make("AdaBayes", twin_params)
    for p, q in zip(params, twin_params, strict=True):
        twin.state[q] = {n: whole(t) for n, t in optimizer.state[p].items()}
    ours = [whole(t) for p in params for t in posterior(optimizer, p)]
    theirs = [t for q in twin_params for t in posterior(twin, q)]
    figures = [[d[1:] for d in (*diagnostics(each).parameters, diagnostics(each).overall)] for each in (optimizer, twin)]
    return {"posterior": bits(ours, theirs), "diagnostics": figures}


def case_no_trace():
    """get_optimizer_state_dict before the first step: the run after it is the run without it."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    ends = []
    for asked in (False, True):
        net = sharded()
        optimizer = make("AdaBayes", net.parameters(), **CLIP)
        if asked:
            get_optimizer_state_dict(net, optimizer)
            steps = [float(optimizer.state[p]["step"]) for p in net.parameters()]
        train(net, optimizer, range(3))
        ends.append(everything(optimizer, list(net.parameters())))
    return {"bits": bits(*ends), "steps": steps}


def main():
    global FOLDER
    FOLDER = Path(sys.argv[1])
    dist.init_process_group("gloo", timeout=timedelta(seconds=40))
    torch.set_num_threads(1)
    cases = {name.removeprefix("case_"): f for name, f in globals().items() if inspect.isfunction(f) and name[:5] == "case_"}
    for case in sys.argv[2:]:
        dist.barrier()
        try:
            found = cases[case]()
        except Exception:
            found = {"raised": traceback.format_exc()}
        (FOLDER / f"{case}.{world()}.{rank()}.json").write_text(json.dumps(found))
        if isinstance(found, dict) and "raised" in found:
            print(found["raised"], file=sys.stderr)
            sys.exit(1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
