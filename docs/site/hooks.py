"""What ``mkdocs build`` makes besides the pages: the benchmarks' tables, the changelog, and formulas as MathML.

Browsers draw MathML themselves, so that a page needs no script from elsewhere.
"""

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
TABLES = "<!-- tables of bench/results -->"  # stands in benchmarks.md where they go
STUDY = "<!-- tables of bench/results/sgd-lr -->"  # in choosing.md
PICTURES = ("cpu-2-cores/step.png", "paper-fashion-small/figure3.png", "paper-fashion-small/figure4.png")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "changelog.md", abs_src_path=str(ROOT / "CHANGELOG.md")))
    for picture in PICTURES:
        files.append(File.generated(config, f"images/{picture.replace('/', '-')}", abs_src_path=str(RESULTS / picture)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    for mark, tables in ((TABLES, benchmarks), (STUDY, study)):
        if mark in markdown:
            markdown = markdown.replace(mark, tables(RESULTS))
    return markdown


def on_page_content(content: str, **_: Any) -> str:
    """arithmatex leaves formulas as text between marks."""

    def formula(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return convert(html.unescape(match[2])[2:-2].strip(), display=display).replace(r"\_", "_")

    content = re.sub(r'<(div|span) class="arithmatex">(.*?)</\1>', formula, content, flags=re.DOTALL)
    return re.sub(r"<td.*?</td>", _breakable, content, flags=re.DOTALL)


def _breakable(cell: re.Match[str]) -> str:
    """On a phone, code in a table may break after these."""

    def code(match: re.Match[str]) -> str:
        return re.sub(r"([_/(.])", r"\1<wbr>", match[0])

    return re.sub(r"(?<=<code>)[^<]*(?=</code>)", code, cell[0])


def study(results: Path) -> str:
    """A table for each task, under headings of the page's third rank."""
    text = (results / "sgd-lr" / "table.md").read_text().partition("\n## ")[2]
    return "### " + text.replace("\n## ", "\n### ")


def benchmarks(results: Path) -> str:
    """A heading for each machine, and a table for each results.json that was made on it."""
    machines: dict[str, list[str]] = {}
    for path in sorted(results.rglob("results.json")):
        data = json.loads(path.read_text())
        tables = {"step": step_table, "host": host_table}
        what = next((row["what"] for row in data["rows"] if row.get("what") in tables), None)
        if what is not None:
            lines = [*tables[what]([row for row in data["rows"] if row["what"] == what]), "", *_made_by(path, data["about"])]
            machines.setdefault(_machine(data["about"]), []).append("\n".join(lines))
    return "\n\n".join(f"## {machine}\n\n" + "\n\n".join(tables) for machine, tables in machines.items())


def _machine(about: dict[str, Any]) -> str:
    gpu = about["gpu"].replace(" (fakecuda)", "")
    if gpu != about["gpu"]:
        return f"A stand-in for the CUDA runtime of an {gpu}, on a CPU"
    return gpu or f"{about['cores']} cores of an {about['cpu'].replace('(R)', '')}"


def _made_by(path: Path, about: dict[str, Any]) -> Iterator[str]:
    yield f"torch {about['versions']['torch']}, {about['date'][:10]}, commit `{about['commit']}`, `{path.relative_to(ROOT)}`."


def _table(rows: list[str], columns: list[str], cells: dict[tuple[str, str], str]) -> Iterator[str]:
    yield " | ".join(["| ", *columns]) + " |"
    yield "| --- |" + " ---: |" * len(columns)
    for row in rows:
        yield " | ".join([f"| {row}", *(cells.get((row, column), "") for column in columns)]) + " |"


def _ratio(x: float) -> str:
    return f"{x:.3f}" if x < 0.1 else f"{x:.2f}"


def step_table(measured: list[dict[str, Any]]) -> Iterator[str]:
    """Each contender's time over that of AdamW fused in the same case."""
    measured = [row for row in measured if row.get("relative") is not None and row["family"] != "floor"]
    cells = {(row["contender"], row["title"]): _ratio(row["relative"]) for row in measured}
    yield "Time of a step, over that of torch's `AdamW(fused=True)` in the same run:\n"
    yield from _table(list(dict.fromkeys(r for r, _ in cells)), list(dict.fromkeys(c for _, c in cells)), cells)


def host_table(measured: list[dict[str, Any]]) -> Iterator[str]:
    """The thread's time, launches, copies and waits of a step."""
    titles = list(dict.fromkeys(row["title"] for row in measured))
    cells = {}
    for row in measured:
        name = f"{row['contender']}, {row['kind']}"
        cells[name, row["title"]] = f"{1e3 * row['host_s']:.2f} ms, {row['launches']:g}"
    yield "Time that the host spends on a step, and how many kernels it launches:\n"
    yield from _table(list(dict.fromkeys(r for r, _ in cells)), titles, cells)
