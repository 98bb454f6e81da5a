"""One step: what is to be updated, read and checked, then launched. Whatever can fail, fails before anything changes.

Plain parameters are read in C++ (``native.new_batch``) as rows of addresses; the others, and all of them where the
extension is missing, are prepared in Python as tensors. ``Stepper`` owns all that lives from step to step.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, clipping, codes
from .algorithms import Algorithm, moves_far
from .backends import native
from .backends.launch import Launch
from .clipping import Clipping, Scaling
from .codes import Storage
from .plain import have_plain_keys, ordinary_mode, watched
from .prepare import Item, Prepared, check_item, new_state, prepare, ready, step_device
from .scalars import Numbers, on, tensor_options
from .sharding import dtensor_type, groups_of, local, spec_of, summed
from .signals import held_back
from .slabs import Slabs
from .table import DTYPES, Table

State = dict[Tensor, Any]
Before = dict[Tensor, dict[str, Any] | None]  # what the state that a step prepares was; None: there was none
CPU = torch.device("cpu")


class Groups(NamedTuple):
    """What a step is given: the parameter groups, the state, and the options of the whole optimizer that it reads."""

    groups: list[dict[str, Any]]
    state: State
    backend: str
    storage: Storage
    seed: int
    clipping: Clipping

    def item(self, g: int, i: int) -> Item:
        p = self.groups[g]["params"][i]
        return Item(g, i, p, p.grad, self.state.get(p, {}))

    def seed_of(self, g: int, i: int) -> int:
        """What the seed of a parameter that has none begins as."""
        before = sum(len(group["params"]) for group in self.groups[:g])
        return codes.new_seed(self.seed, before + i, float(self.groups[g]["r"]))


class Stepper:
    """Owns what an optimizer remembers between steps. What it remembers of memory, it holds a reference to; never to parameters.

    Attributes:
        numbers: of the groups that have been checked.
        slabs: memory of the state of small tensors.
    """

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm = algorithm
        self.numbers = Numbers(algorithm)
        self.slabs = Slabs()
        self._norm: float | Tensor | None = None
        self._skipped = torch.zeros((), dtype=torch.int64, device="cpu")
        self._reader: tuple[Any, Any] = (None, None)
        self._devices: set[torch.device] = set()  # on which there have been parameters
        self._tables: dict[tuple[Any, ...], Table] = {}
        self._kept_alive: list[Tensor] = []  # what captured graphs go on reading

    @property
    def grad_norm(self) -> Tensor | None:
        """Of the last step, a 0-dim float64 tensor where it was summed; None where nobody wanted it."""
        norm = self._norm
        if isinstance(norm, Tensor):  # a decision
            return norm[1]
        return None if norm is None else torch.tensor(norm, dtype=torch.float64, device="cpu")

    @property
    def skipped(self) -> Tensor:
        """How many steps were skipped: a 0-dim int64 tensor, on the device that decides."""
        return self._skipped

    def use_slabs(self, slabs: Slabs) -> None:
        """Has new state in these slabs, in which the state that was loaded lies."""
        self.slabs = slabs
        self.forget_state()

    def forget_state(self) -> None:
        """Has the next step look at all state, and lets go of it: others may change it from now on."""
        if self._reader[1] is not None:
            self._reader[1].forget()

    def step(self, given: Groups, items: list[Item] | None, scaling: Scaling) -> None:
        """Updates every parameter that has a gradient, or ``items``, and counts; changes nothing where it raises."""
        self._norm = None
        if given.clipping.reads_gradients_first:
            clipping.check_whole(given.groups)
        # A mode that must see each operation sees none of C++, and may have given the tensors no values.
        batch = None if watched() else self.reader(given)
        before: Before = {}
        run = None
        try:
            run = self._collect(given, batch, items, scaling, before)
        finally:
            if run is None:
                _put_back(given.state, before)
                if batch is not None:
                    batch.clear()
        if run is None:
            return
        try:
            run()
        finally:
            if batch is not None:
                _let_go(batch)

    def _collect(
        self, given: Groups, batch: Any, items: list[Item] | None, scaling: Scaling, before: Before
    ) -> Callable[[], None] | None:
        """All of a step up to its launches. Returns the function that makes them; None where the step is to be skipped."""
        left = self._read(given, batch, items)
        if capturing() and any(group["capturable"] for group in given.groups):
            _check_capture(given, left)
        prepared = self._prepare(given, left, before) if left else []
        if before and items is None and _only_makes_state(given, prepared, before):
            if batch is not None:
                batch.clear()
            return lambda: None
        by_tensor = [p for p in prepared if batch is None or not _add(batch, p)]
        launches = [] if batch is None else _launches_of_rows(self.algorithm, given, batch)
        launches += _launches_of_tensors(self.algorithm, given, by_tensor)
        alike: Counter[tuple[Any, ...]] = Counter()  # DTensors of several placements, or replicated beside plain tensors
        for launch in launches:
            if launch.backend not in ("cpp", "foreach"):
                key = launch.key
                alike[key] += 1
                launch.table, launch.kept_alive = self._table(key, alike[key]), self._kept_alive
        waits = any(_host_reads(launch.device) for launch in launches)
        decides = bool(launches) and not waits and (given.clipping.reads_gradients_first or scaling.on_device)
        factor = 1.0
        if not decides:
            known, self._norm = clipping.known(launches, given.clipping, scaling)
            if known is None:
                self._skipped += 1
                return None
            factor = known
        self._set_numbers(given, launches, factor, decides, None if items is None else {item.group for item in items})
        updates = _updates(launches, prepared)
        backend = launches[0].backend if len(updates) == 1 and not decides else ""
        # All is changed in one call, which no signal interrupts.
        at_once = backend == "cpp" or backend == "cuda" and len(launches) == 1 and not prepared

        def run() -> None:
            if at_once:
                return updates[0]()
            with held_back():
                if decides:
                    self._decide(launches, given.clipping, scaling)
                for update in updates:
                    update()

        return run

    def _table(self, *key: Any) -> Table:
        if key not in self._tables:
            self._tables[key] = Table()
        return self._tables[key]

    def reader(self, given: Groups) -> Any:
        """The C++ reader of parameters and state; None where there is none."""
        if not self._devices:
            self._devices = {local(p).device for group in given.groups for p in list(group["params"])[:1]}
        key = (given.backend, given.storage, dtensor_type(), len(self._devices))
        if self._reader[0] != key:
            types = set()
            for device in self._devices:  # of no other are the kernels looked for, which takes memory there
                try:
                    if backends.choose(given.backend, device) in backends.READ_TABLES:
                        types.add(device.type)
                except RuntimeError:  # raised for the parameter that needs it
                    pass
            self._reader = key, native.new_batch(self.algorithm, given.storage, types, dtensor_type())
        return self._reader[1]

    def _read(self, given: Groups, batch: Any, items: list[Item] | None) -> list[Item]:
        """Fills ``batch``; returns what it leaves to Python of ``items``, or of all parameters with a gradient."""
        if batch is None:
            return _unread(given) if items is None else items
        held = items is not None or _references(given) > _REFERENCES_OF_ONE
        # A norm sums what is spread over processes apart from what each has whole.
        batch.begin(self.slabs.all, held, given.clipping.reads_gradients_first)
        if items is not None:
            return [item for item in items if not batch.add(item.param, item.grad, item.state, item.group, None)]
        groups = enumerate(given.groups)
        return [given.item(g, i) for g, group in groups for i in batch.read(group["params"], given.state, g)]

    def _prepare(self, given: Groups, items: list[Item], before: Before) -> list[Prepared]:
        algorithm, storage, unwatched = self.algorithm, given.storage, not watched()
        entries = (entry for entry in given.state.values() if isinstance(entry, dict))  # hooks may keep state of no parameter
        self.slabs.forget_unused(t for entry in entries for t in entry.values())
        layouts = {dtype: storage.layout(algorithm, dtype) for dtype in DTYPES if storage.why_not(dtype) is None}
        found = []
        for item in items:  # all of them before the first is touched
            tensors = ready(item, layouts) if unwatched else None
            if tensors is None:
                check_item(item, algorithm, storage)
            device = local(item.param).device
            self._devices.add(device)
            found.append((item, backends.choose(given.backend, device), tensors))
        prepared = []
        for item, backend, tensors in found:
            p = item.param
            if tensors is not None:
                known = Prepared.of(item, layouts[p.dtype], tensors, backend)
                if backend == "foreach" or have_plain_keys(*tensors, *known.numbers):
                    prepared.append(known)
                    continue
            layout = storage.layout(algorithm, p.dtype)
            seed = given.seed_of(item.group, item.position) if layout.random and "seed" not in item.state else 0
            if item.state:
                before.setdefault(p, dict(item.state))
            else:
                given.state[p] = new_state(algorithm, layout, p, seed, self.slabs)
                before[p] = None
                item = item._replace(state=given.state[p])
            prepared.append(prepare(item, algorithm, layout, seed, backend, self.slabs))
        return prepared

    def _set_numbers(
        self, given: Groups, launches: list[Launch], factor: float, decides: bool, used: set[int] | None
    ) -> None:
        far = any(moves_far(group) for group in given.groups) if any(launch.backend == "triton" for launch in launches) else False
        rows: dict[torch.device, Any] = {}
        for launch in launches:
            device = launch.device
            if device not in rows:
                rows[device] = self.numbers.rows(given.groups, used, device, _host_reads(device))
            launch.numbers, launch.factor, launch.far, launch.decides = rows[device], factor, far, decides
            if launch.backend == "cpp":
                launch.packed = self.numbers.packed(rows[device], factor)
            elif launch.backend != "foreach":
                launch.packed = self.numbers.on(device, rows[device], factor, self._kept_alive)

    def _decide(self, launches: list[Launch], given: Clipping, scaling: Scaling) -> None:
        home = launches[0].device
        if self._skipped.device != home:
            with ordinary_mode():
                self._skipped = on(home, self._skipped, torch.int64)
        decision = clipping.decide(launches, given, scaling, self._skipped)
        self._norm = decision if given.reads_gradients_first else None
        if capturing():
            self._kept_alive += [self._skipped, *(launch.table.sums for launch in launches if launch.table is not None)]
        for launch in launches:
            launch.decision = decision if launch.device == home else decision.to(launch.device, non_blocking=True)


def _host_reads(device: torch.device) -> bool:
    """Whether the host reads step counts, norms and options of parameters there, rather than leave them to an accelerator or to
    who watches. Those of the meta device have their counts on the CPU."""
    return device.type in ("cpu", "meta") and not watched()


def _let_go(batch: Any) -> None:
    """Of the gradients. The step is made: it must not fail any more, and the next one lets go of them, too."""
    try:
        batch.release()
    except MemoryError:
        return


def _updates(launches: list[Launch], prepared: list[Prepared]) -> list[Callable[[], None]]:
    """What each backend does of the step, once all of it can be done."""
    updates = []
    for name in dict.fromkeys(launch.backend for launch in launches):
        copies = [p.copied for p in prepared if p.copied is not None and p.backend == name]
        updates.append(backends.BACKENDS[name].prepare([launch for launch in launches if launch.backend == name], copies))
    return updates


def _put_back(state: State, before: Before) -> None:
    for p, was in before.items():
        if was is None:
            del state[p]
            continue
        entry = state[p]
        entry.update(was)
        for name in entry.keys() - was.keys():
            del entry[name]


def _only_makes_state(given: Groups, prepared: list[Prepared], before: Before) -> bool:
    """Whether all state is new, every ``lr`` is 0 and every gradient zero: torch.distributed.checkpoint's step for the sake of
    the state (``_init_optim_state``). It updates nothing and is not counted. Asked where state is made, and waits for an
    accelerator only at ``lr = 0``."""
    lrs = [group["lr"] for group in given.groups]
    if any(isinstance(lr, Tensor) and lr.device.type != "cpu" or lr != 0 for lr in lrs):
        return False
    created = [p for p, was in before.items() if was is None]
    if not created or watched() or capturing() or len(created) < len(given.state):
        return False
    # A process that holds only zeros of it, or nothing, must not take a first step of warm-up for that.
    nonzero: dict[tuple[Any, ...], list[Tensor]] = {}
    for p in prepared:
        nonzero.setdefault(groups_of(spec_of(p.param)), []).append(p.tensors[1].any())
    return not any(summed({groups: clipping.total(found) for groups, found in nonzero.items()}))


def _add(batch: Any, p: Prepared) -> bool:
    if p.backend not in backends.READ_TABLES:
        return False
    taken: bool = batch.add(p.tensors[0], p.tensors[1], p.state, p.group, spec_of(p.param))
    return taken


def _unread(given: Groups) -> list[Item]:
    """Every parameter with a gradient."""
    groups = enumerate(given.groups)
    return [given.item(g, i) for g, group in groups for i, p in enumerate(group["params"]) if p.grad is not None]


def _references(given: Groups) -> int:
    return sys.getrefcount(given.state)


def _references_of_one() -> int:
    """What is counted where nobody else holds the state."""
    optimizer = SimpleNamespace(state={})
    return _references(Groups([], optimizer.state, "", Storage(False), 0, Clipping(None, False)))


_REFERENCES_OF_ONE = _references_of_one()


def capturing() -> bool:
    """Whether a CUDA graph captures what is launched on the current stream."""
    begun: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return begun and torch.cuda.is_current_stream_capturing()


def _check_capture(given: Groups, left: list[Item]) -> None:
    """Raises for what a CUDA graph would freeze or lose: state made during capture, options the host holds in tensors."""
    for item in left:
        if not item.state:
            raise RuntimeError(f"{item} has no state yet: run a few steps before capturing a CUDA graph")
        if item.state["step"].device != step_device(item.param):
            raise RuntimeError(f"{item} has its step count on the CPU: run a step before capturing")
    for g, group in enumerate(given.groups):
        for name, value in tensor_options(group).items():
            if value.device.type == "cpu":
                raise RuntimeError(
                    f"{name} of group {g} is a tensor on the CPU, where replays of a CUDA graph would not see it change; "
                    f"move it to the GPU, in optimizer.param_groups[{g}]"
                )


def _launches_of_rows(algorithm: Algorithm, given: Groups, batch: Any) -> list[Launch]:
    return [
        Launch(
            algorithm,
            given.storage,
            backends.choose(given.backend, device),
            device,
            DTYPES[param_dtype],
            DTYPES[grad_dtype],
            address=address,
            count=count,
            spread=groups_of(spec),
        )
        for device_type, index, param_dtype, grad_dtype, address, count, spec in batch.buckets()
        for device in (CPU if device_type == native.DLPACK_CPU else torch.device("cuda", index),)
    ]


def _launches_of_tensors(algorithm: Algorithm, given: Groups, prepared: list[Prepared]) -> list[Launch]:
    buckets: dict[tuple[Any, ...], list[Prepared]] = {}
    for p in prepared:
        param, grad = p.tensors[:2]
        spread = groups_of(spec_of(p.param)) if given.clipping.reads_gradients_first else ()
        buckets.setdefault((p.backend, param.device, param.dtype, grad.dtype, spread), []).append(p)
    launches = []
    for (backend, device, param_dtype, grad_dtype, spread), members in buckets.items():
        if backend == "foreach" and given.backend == "auto":
            backends.warn_of_foreach(device)
        launches.append(
            Launch(
                algorithm,
                given.storage,
                backend,
                device,
                param_dtype,
                grad_dtype,
                tensors=[p.tensors for p in members],
                numbers_of=[p.numbers for p in members],
                group_of=[p.group for p in members],
                places=[p.place for p in members],
                spread=spread,
                known_steps=_host_reads(device),
            )
        )
    return launches
