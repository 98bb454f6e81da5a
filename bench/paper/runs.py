"""What a results folder holds: runs, and groups of those that may be compared."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from . import reported

FIGURE3 = ".figure3.json"
OURS = "AdaBayes"

KEYS = {"data", "data_key", "network", "title", "parameters", "optimizer", "seed", "options", "protocol", "machine", "epochs"}
PROTOCOL = {"epochs", "drop", "factor", "batch_size", "train_images", "test_images", "augmentation", "precision", "width"}
FIGURES = {"epoch", "test_error", "test_loss"}


class BrokenRun(ValueError):
    """A folder without runs, a file that holds none, or one that does not belong to the others."""


def read(folder: Path) -> list[dict[str, Any]]:
    """Every run below ``folder/runs``, in the table's order, each with its "path".

    Raises: BrokenRun where there is no run, and, naming the file, where one does not hold a run.
    """
    paths = sorted((folder / "runs").rglob("[!.]*.json"))  # not what a killed run was writing
    paths = [path for path in paths if not path.name.endswith(FIGURE3)]
    if not paths:
        raise BrokenRun(f"there are no runs in {folder / 'runs'}")
    return sorted((_read_run(path) for path in paths), key=lambda run: (_position(run["optimizer"]), run["seed"]))


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:  # of the JSON or of its bytes
        raise BrokenRun(f"{path} is broken: {error}") from error


def _read_run(path: Path) -> dict[str, Any]:
    run = read_json(path)
    wrong = _lacks(run, KEYS) or _lacks(run["protocol"], PROTOCOL)
    wrong = wrong or next(filter(None, (_lacks(epoch, FIGURES) for epoch in run["epochs"])), "")
    if not wrong and [epoch["epoch"] for epoch in run["epochs"]] != list(range(1, len(run["epochs"]) + 1)):
        wrong = "its epochs are not 1, 2, 3 and so on"
    if wrong:
        raise BrokenRun(f"{path} holds no run: {wrong}")
    return run | {"path": path}


def _lacks(part: Any, keys: set[str]) -> str:
    missing = keys - part.keys() if isinstance(part, dict) else keys
    return f"it lacks {', '.join(sorted(missing))}" if missing else ""


def complete(run: Mapping[str, Any]) -> bool:
    return len(run["epochs"]) == run["protocol"]["epochs"]


def original(optimizer: str) -> str:
    """What a variant is a variant of: "AdaBayes" for "AdaBayes, slow path"; of what is none, the name itself."""
    return optimizer.partition(", ")[0]


def _position(optimizer: str) -> tuple[bool, int, str]:
    """Table 1's order, then the variants, AdaBayes's first."""
    place = reported.ORDER.index(original(optimizer)) if original(optimizer) in reported.ORDER else len(reported.ORDER)
    return (False, place, "") if optimizer in reported.ORDER else (True, -place, optimizer)


class Group(NamedTuple):
    """Runs that may be compared: of the same data, network and protocol. ``first`` is one; ``complete`` are by optimizer."""

    first: dict[str, Any]
    complete: dict[str, list[dict[str, Any]]]
    incomplete: list[dict[str, Any]]

    @property
    def protocol(self) -> dict[str, Any]:
        return self.first["protocol"]

    @property
    def title(self) -> str:
        width = self.protocol["width"]
        return f"{self.first['data']}, {self.first['title']}" + (f" of width {width:g}" if width != 1 else "")

    @property
    def paper(self) -> tuple[str, str]:
        """The data and network of Table 1 beside which the group stands: its own, or CIFAR-10 and ResNet-34."""
        data, network = self.first["data_key"], self.first["network"]
        return data if data in reported.DATA else "cifar10", network if network in reported.NETWORKS else "resnet34"

    @property
    def paper_title(self) -> str:
        return f"{reported.DATA[self.paper[0]]}, {reported.NETWORKS[self.paper[1]]}"


def groups(runs: Iterable[dict[str, Any]]) -> list[Group]:
    """Raises: BrokenRun where an optimizer's seeds were trained with different options."""
    found: dict[str, Group] = {}
    for run in runs:
        key = json.dumps([run["data"], run["network"], run["protocol"]], sort_keys=True)
        group = found.setdefault(key, Group(run, {}, []))
        seeds = group.complete.setdefault(run["optimizer"], []) if complete(run) else group.incomplete
        if complete(run) and seeds and seeds[0]["options"] != run["options"]:
            raise BrokenRun(f"{run['path']} and {seeds[0]['path']} have different options: no mean over them has a meaning")
        seeds.append(run)
    return list(found.values())
