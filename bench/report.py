"""What is read: a table per case, and the same rows as JSON (with every raw time) and CSV."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable
from pathlib import Path

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

RAW = ("block_s", "first_s")


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:.4g}"


def megabytes(n: float) -> str:
    return f"{n / 1e6:,.2f}"


STEP = {  # column: where it stands in a row, how it is shown
    "median\nms": ("median_s", ms),
    "p20\nms": ("p20_s", ms),
    "p80\nms": ("p80_s", ms),
    "/ AdamW\nfused": ("relative", "{:.3g}".format),
    "/ slow\npath": ("of_slow_path", "{:.3g}".format),
    "alone\nms": ("first_median_s", ms),
    "host\nms": ("host_s", ms),
    "kernels\nms": ("kernels_s", ms),
    "events\nms": ("events_median_s", ms),
    "launches": ("launches", "{:.4g}".format),
    "MB\nmoved": ("moved_bytes", megabytes),
    "GB/s": ("gb_per_s", "{:.1f}".format),
    "% of\nfloor": ("percent_of_floor", "{:.0f}".format),
    "extra\nMB": ("peak_extra_bytes", megabytes),
}
KERNEL = ("compiler", "target", "kernel", "param", "grad", "registers", "spilled_bytes", "load_width", "store_width")


def show(rows: list[dict], console: Console) -> None:
    for (what, title), group in itertools.groupby(rows, key=lambda row: (row["what"], row.get("title", ""))):
        console.print(TABLES[what](title, list(group)))


def step_table(title: str, rows: list[dict]) -> Group:
    first = rows[0]
    heading = (
        title
        if not first.get("parameters")
        else f"{title}: {first['parameters']:,} parameters, {first['dtype']}, {first['device']}"
    )
    columns = {name: column for name, column in STEP.items() if any(row.get(column[0]) is not None for row in rows)}
    return _with_notes(_table(heading, rows, columns), rows)


def memory_table(title: str, rows: list[dict]) -> Group:
    def per(*keys: str) -> Callable[[dict], str]:
        return lambda row: f"{sum(row[key] for key in keys) / row['parameters']:.2f}"

    columns = {
        "state": per("state_bytes"),
        "with weights\nand gradients": per("state_bytes", "parameter_bytes"),
        "at the peak\nof a step": per("state_bytes", "parameter_bytes", "peak_extra_bytes"),
        "moved by\na step": per("moved_bytes"),
    }
    table = Table("optimizer", title=f"{title}: bytes per parameter", title_justify="left")
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        if "state_bytes" in row:
            table.add_row(row["contender"], *(column(row) for column in columns.values()))
    return _with_notes(table, rows)


def kernel_table(title: str, rows: list[dict]) -> Group:
    table = Table(
        *(name.replace("_", "\n") for name in KERNEL), title="Kernels, compiled offline; widths in bytes", title_justify="left"
    )
    for row in rows:
        if not row["note"]:
            table.add_row(*(str(row[key]) for key in KERNEL))
    notes = [row | dict(contender=f"{row['compiler']}, {row['target']}") for row in rows]
    return _with_notes(table, notes)


HOST = {
    "host\nus": ("host_s", lambda seconds: f"{1e6 * seconds:.0f}"),
    "/ AdamW\nfused": ("relative", "{:.2f}".format),
    "launches": ("launches", str),
    "copies": ("copies", str),
    "waits": ("waits", str),
}


def host_table(title: str, rows: list[dict]) -> Group:
    table = Table("step", "optimizer", title=f"{title}: the host's time and what the GPU is given", title_justify="left")
    for name in HOST:
        table.add_column(name, justify="right")
    for row in rows:
        if "host_s" in row:
            shown = ("" if row.get(key) is None else form(row[key]) for key, form in HOST.values())
            table.add_row(row["kind"], row["contender"], *shown)
    return _with_notes(table, rows)


TABLES = dict(step=step_table, scaling=step_table, memory=memory_table, kernels=kernel_table, host=host_table)


def _table(title: str, rows: list[dict], columns: dict) -> Table:
    table = Table("optimizer", title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if "median_s" in row:
            shown = ("" if row.get(key) is None else form(row[key]) for key, form in columns.values())
            table.add_row(row["contender"], *shown, style="bold" if row["family"] == "ours" else None, end_section=False)
    return table


def _with_notes(table: Table, rows: list[dict]) -> Group:
    notes = Table.grid(padding=(0, 2))
    for row in rows:
        if row["note"]:
            notes.add_row(f"  {row['contender']}", Text(row["note"], style="red" if row["wrong"] else ""))
    return Group(*([table] if table.rows else [Text(str(table.title))]), notes, "")


def write(folder: Path, about: dict, rows: list[dict]) -> list[Path]:
    """Writes results.json, and results.csv and kernels.csv for what was measured; returns their paths."""
    written = [folder / "results.json"]
    written[0].write_text(json.dumps(dict(about=about, rows=rows), indent=1) + "\n")
    kernels = [row for row in rows if row["what"] == "kernels"]
    for name, some in (("results.csv", [row for row in rows if row["what"] != "kernels"]), ("kernels.csv", kernels)):
        if some:
            columns = list(dict.fromkeys(key for row in some for key in row if key not in RAW))
            with (folder / name).open("w", newline="") as file:
                writer = csv.DictWriter(file, columns, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(some)
            written.append(folder / name)
    return written
