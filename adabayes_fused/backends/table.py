"""The table a GPU kernel reads, in one buffer: coefficients, rows, then the chunk map. One asynchronous copy a step."""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import ROW_WORDS, Launch

_chunk_maps: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # (chunk, parameters) -> last numels and their map


def chunk_map(numels: Tensor, chunk: int) -> Tensor:
    """One word a program: the row's index above the number of the chunk in its tensor. Empty tensors get none."""
    counts = (numels + (chunk - 1)) // chunk
    rows = torch.repeat_interleave(torch.arange(len(numels), device="cpu"), counts)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return (rows << 32) | (torch.arange(len(rows), device="cpu") - first)


def _cached_chunk_map(numels: Tensor, chunk: int) -> Tensor:
    key = (chunk, len(numels))
    cached = _chunk_maps.get(key)
    if cached is None or not torch.equal(cached[0], numels):
        cached = _chunk_maps[key] = (numels.clone(), chunk_map(numels, chunk))
    return cached[1]


def upload(launch: Launch, chunk: int) -> tuple[Tensor, Tensor]:
    """Rows and chunk map on the launch's device, without waiting for it; coefficients that the host knows go along."""
    if launch.uploaded is not None:
        return launch.uploaded
    rows = launch.rows()
    chunks = _cached_chunk_map(rows[:, 6], chunk)
    known = launch.coefficient_rows() if launch.coefficients is not None else None
    known = known if known is not None and known.device.type == "cpu" else None
    head = known.view(torch.int64).reshape(-1) if known is not None else rows.new_empty(0)
    packed = torch.empty(
        len(head) + rows.numel() + len(chunks), dtype=torch.int64, device="cpu", pin_memory=launch.device.type == "cuda"
    )
    torch.cat((head, rows.reshape(-1), chunks), out=packed)
    table = packed.to(launch.device, non_blocking=True)
    if launch.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        launch.kept_alive.append(packed)  # the graph copies from it at every replay
    coefficients, rows, chunks = torch.split(table, [len(head), rows.numel(), len(chunks)])
    if known is not None:
        launch.coefficients = coefficients.view(torch.float64)
    launch.uploaded = rows.view(-1, ROW_WORDS), chunks
    return launch.uploaded


def coefficients_of(launch: Launch) -> Tensor:
    """The coefficients where the rows are; ``upload`` has been there."""
    return launch.coefficient_rows().to(launch.device, non_blocking=True)
