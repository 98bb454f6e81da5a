"""One case: every contender verified, then timed in turn with the others and with the floors: ``python -m bench step``."""

from __future__ import annotations

from argparse import Namespace

import torch

from . import floor, memory
from .case import Case, Row
from .check import Checker
from .contenders import ANCHOR, Contender
from .shapes import bounded, random_parameters
from .timing import Tell, Turns, alternate, gpu_times, quick_median


def measure(what: str, name: str, options: Namespace, tell: Tell) -> list[Row]:
    """The rows of a case, the floors' first."""
    torch.manual_seed(0)
    case = Case(what, name, options)
    case.leave_out_slow_compilations()
    case.each(Checker(case.all, bounded(case.shapes), case.device, case.dtype).check, tell, "verifying")
    torch.compiler.reset()  # else shapes verified before would be compiled together with those to come
    floors = timed(case, tell)
    host_overheads(case, tell)
    return floors + list(case.rows.values())


def timed(case: Case, tell: Tell) -> list[Row]:
    """Times and memory of all contenders, into their rows; returns the floors'."""
    made: dict[str, tuple] = {}

    def prepare(contender: Contender) -> Turns:
        params = case.parameters_for(contender)
        optimizer = contender.make(params)
        turns = Turns(optimizer.step)
        made[contender.name] = (optimizer, params)
        return turns

    turns = case.each(prepare, tell, "warming up")
    traffics = {n: memory.traffic(*made[n], case.loop.clipped) for n in turns}
    floors, floor_note = find_floors(case, traffics)
    floor_turns = {f.name: Turns(f.step) for f in floors.values()}
    alternate(floor_turns | turns, case.options.rounds, case.options.budget, tell)
    for n, one in turns.items():
        case.rows[n] |= one.summary()
    relate(case, traffics, floors, floor_turns)
    clipped = case.loop.clipped
    case.each(lambda c: case.rows[c.name].update(memory.figures(*made[c.name], case.device, clipped)), tell, "memory of")
    if case.device == "cuda":
        case.each(lambda c: case.rows[c.name].update(gpu_times(turns[c.name].step)), tell, "kernels of")
    return floor_rows(case, floors, floor_turns, floor_note)


def find_floors(case: Case, traffics: dict[str, memory.Traffic]) -> tuple[dict[memory.Traffic, floor.Floor], str]:
    if not traffics:
        return {}, "nothing was timed"
    if case.device == "cuda":
        return floor.gpu_floors(set(traffics.values()), case.device, case.parameters), ""
    library, note = case.options.floor
    return (floor.cpu_floors(set(traffics.values()), library) if library else {}), note


def floor_rows(case: Case, floors, floor_turns: dict[str, Turns], note: str) -> list[Row]:
    about = case.about | dict(family="floor", backend="", detail=True, wrong=False)
    if not floors:
        return [about | dict(contender="floor", note=note)]
    moved = {f.name: f.moved for f in floors.values()}
    rows = [about | dict(contender=n, note="", moved_bytes=moved[n]) | t.summary() for n, t in floor_turns.items()]
    return [
        row | dict(gb_per_s=row["moved_bytes"] / row["median_s"] / 1e9) for row in sorted(rows, key=lambda r: r["moved_bytes"])
    ]


def relate(case: Case, traffics, floors, floor_turns: dict[str, Turns]) -> None:
    """Ratios to the anchor and to the slow path, bandwidths and shares of the floor."""
    anchor = case.rows[ANCHOR].get("median_s")
    for n, traffic in traffics.items():
        row = case.rows[n]
        row |= dict(relative=row["median_s"] / anchor if anchor else None, gb_per_s=traffic.moved / row["median_s"] / 1e9)
        judge = case.rows.get(case.contenders[n].judge or "", {})
        if judge.get("family") == "slow path" and "median_s" in judge:
            row["of_slow_path"] = row["median_s"] / judge["median_s"]
        if traffic in floors:
            found = floors[traffic]
            row["floor_s"] = floor_turns[found.name].summary()["median_s"] * traffic.moved / found.moved
            row["percent_of_floor"] = 100 * row["floor_s"] / row["median_s"]


def host_overheads(case: Case, tell: Tell) -> None:
    """The same number of tensors, two elements each: what is left is the host's work. (One-element tensors may be special.)"""

    def overhead(contender: Contender) -> float | None:
        if contender.compiles:  # would be compiled once more
            return None
        params = random_parameters([(2,)] * len(case.shapes), case.device, case.dtype)
        return quick_median(contender.make(params).step)

    for n, seconds in case.each(overhead, tell, "host overhead of").items():
        case.rows[n]["host_s"] = seconds
