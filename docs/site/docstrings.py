"""Docstrings as Markdown: reStructuredText's roles and formulas, which ``pydoc`` and ``help`` show as they stand."""

import inspect
import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|meth|func|attr):`~?([^`<]*?)([^`.<]+)`")
FORMULA = re.compile(r"^( *)\.\. math::\n((?:(?:\1 +.*)?\n)+)", re.MULTILINE)
SHARED = re.compile(r"^( +)((?:\w+,\s+)+\w+): (.*)$", re.MULTILINE)  # arguments described together


def _each(match: re.Match[str]) -> str:
    return "\n".join(f"{match[1]}{name}: {match[3]}" for name in re.split(r",\s+", match[2]))


def _formula(match: re.Match[str]) -> str:
    return f"$$\n\\begin{{align*}}\n{inspect.cleandoc(match[2])}\n\\end{{align*}}\n$$\n\n"


def as_markdown(docstring: str) -> str:
    docstring = FORMULA.sub(_formula, docstring + "\n")
    docstring = SHARED.sub(_each, docstring)
    docstring = re.sub(r":math:`([^`]+)`", r"$\1$", docstring)
    docstring = ROLE.sub(r"`\2`", docstring)
    docstring = re.sub(r"^(Raises|Returns|Source): (?=\S)", r"**\1:** ", docstring, flags=re.MULTILINE)  # one line, no section
    return re.sub(r"::$", ":", docstring, flags=re.MULTILINE).replace("``", "`")


class Markdown(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(inspect.cleandoc(obj.docstring.value))
