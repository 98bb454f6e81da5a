"""Hooks of the documentation's build (mkdocs.yml): pages that are made of committed files, so that they cannot grow stale."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PICTURES = {
    f"images/paper-fashion-{figure}.png": RESULTS / "paper-fashion-small" / f"{figure}.png" for figure in ("figure3", "figure4")
}
HIDDEN = ("floor", "")  # families that are no optimizers


def on_files(files: Any, config: Any) -> Any:
    """Adds the pictures that pages show and that lie with the results."""
    from mkdocs.structure.files import File

    for uri, path in (PICTURES | step_pictures()).items():
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Puts what is made in place of the page's comment."""
    makers = {"changelog.md": changelog, "benchmarks.md": benchmarks, "paper.md": paper_table, "choosing.md": study_tables}
    made = makers.get(page.file.src_uri)
    return re.sub(r"<!-- bench/site\.py .*? -->", lambda _: made(), markdown) if made else markdown


def changelog() -> str:
    return (ROOT / "CHANGELOG.md").read_text()


def paper_table() -> str:
    """The table and its notes, without headings."""
    text = (RESULTS / "paper-fashion-small" / "table.md").read_text().split("\n### ")[0]
    return "\n".join(line for line in text.splitlines() if not line.startswith("#"))


def study_tables() -> str:
    """Of lr and sgd_lr, for each task, under headings of the page's third rank."""
    text = (RESULTS / "sgd-lr" / "table.md").read_text().partition("\n## ")[2]
    return "### " + text.replace("\n## ", "\n### ")


def folders() -> list[Path]:
    """Of results that hold steps."""
    found = sorted(path.parent for path in RESULTS.rglob("results.json"))
    return [folder for folder in found if any(row.get("what") == "step" for row in rows_of(folder))]


def rows_of(folder: Path) -> list[dict]:
    found = json.loads((folder / "results.json").read_text())
    return found.get("rows", [])


def step_pictures() -> dict[str, Path]:
    return {f"images/steps/{name_of(folder)}.png": path for folder in folders() if (path := folder / "step.png").exists()}


def name_of(folder: Path) -> str:
    return "-".join(folder.relative_to(RESULTS).parts)


def benchmarks() -> str:
    return "\n\n".join(section(folder) for folder in folders())


def section(folder: Path) -> str:
    about = json.loads((folder / "results.json").read_text())["about"]
    machine = about["gpu"] or f"{about['cpu']}, {about['cores']} cores"
    versions = about["versions"]
    lines = [
        f"## {machine}: {folder.relative_to(RESULTS)}",
        "",
        f"torch {versions['torch']}, {about['date'][:10]}. `{about['command']}`",
        "",
        table([row for row in rows_of(folder) if row.get("what") == "step" and row.get("family") not in HIDDEN]),
    ]
    if (folder / "step.png").exists():
        lines += ["", f"![Step times of every contender](images/steps/{name_of(folder)}.png)"]
    return "\n".join(lines)


def table(rows: list[dict]) -> str:
    """Ratios to AdamW's time: a line for each contender that was measured, a column for each case."""
    measured = [row for row in rows if row.get("relative")]
    cases = {row["case"]: row["title"].split(":")[0] for row in measured}
    ratios = {(row["contender"], row["case"]): f"{row['relative']:.3g}" for row in measured}
    titles = " | ".join(f"{title} (`{case}`)" for case, title in cases.items())
    lines = [f"| | {titles} |", "| --- |" + " --: |" * len(cases)]
    for contender in dict.fromkeys(row["contender"] for row in measured):
        lines.append(f"| {contender} | " + " | ".join(ratios.get((contender, case), "") for case in cases) + " |")
    return "\n".join(lines)
