"""
Docstrings in the way of transformers, as Markdown: griffe knows other ways only.

Lists of arguments, results and errors become Markdown lists, and `` [`EBTConfig`] `` a link.
"""

import ast
import re
from pathlib import Path

import griffe


ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "ebt_transformers"
TITLES = ("Args", "Returns", "Raises", "Yields", "Attributes", "Note")
LISTS = ("Args", "Raises", "Attributes")
DESCRIPTIONS = ("_DESCRIPTION", "_KWARGS_DESCRIPTION")
HEAD = re.compile(rf"^( *)({'|'.join(TITLES)}):$")
ENTRY = re.compile(r"^(\*{0,2}\w[\w.]*(?:, \*{0,2}\w[\w.]*)*)(?=:| \()")
REFERENCE = re.compile(r"\[(`~?([\w.]+)`)\](?![\[(])")


def public_names() -> dict[str, str]:
    """Every name documented in the reference -> its full name, as the reference's own pages have it."""
    pages = sorted((ROOT / "docs" / "api").glob("*.md"))
    found = (name for page in pages for name in re.findall(r"^::: (\S+)", page.read_text("utf-8"), re.MULTILINE))
    return {name.rpartition(".")[2]: name for name in found}


def linked(text: str, names: dict[str, str]) -> str:
    """References in brackets as links where the reference has the name, else as plain code."""

    def link(found: re.Match[str]) -> str:
        name = found[2]
        owner, dot, rest = name.rpartition(".")
        if name in names:
            return f"[`{name}`][{names[name]}]"
        if owner in names:
            return f"[`{name}`][{names[owner]}{dot}{rest}]"
        if rest in names:
            return f"[`{rest}`][{names[rest]}]"
        return f"`{name}`"

    return REFERENCE.sub(link, text)


def as_list(lines: list[str]) -> list[str]:
    """Entries `name (type): text`, their further lines indented, as a Markdown list."""
    result = []
    for line in lines:
        if line.startswith(" ") or not line:
            result.append(line)
        else:
            result.append("- " + ENTRY.sub(lambda found: f"**`{found[1]}`**", line))
    return result


def as_markdown(docstring: str) -> str:
    """A docstring with its sections (`Args:` ...) as bold titles over lists and paragraphs."""
    result: list[str] = []
    lines = docstring.splitlines()
    while lines:
        line = lines.pop(0)
        head = HEAD.match(line)
        if not head:
            result.append(line)
            continue
        inner = head[1] + "    "
        block = []
        while lines and (not lines[0].strip() or lines[0].startswith(inner)):
            block.append(lines.pop(0).removeprefix(inner).rstrip())
        title = "Arguments" if head[2] == "Args" else head[2]
        result += ["", f"**{title}**", "", *(as_list(block) if head[2] in LISTS else block), ""]
    return "\n".join(result)


class TransformersDocstrings(griffe.Extension):
    """Rewrites every docstring of the package as it is read."""

    def __init__(self) -> None:
        self.names = public_names()

    def on_instance(self, *, node: ast.AST | griffe.ObjectNode, obj: griffe.Object, **kwargs: object) -> None:
        """Called by griffe for every module, class, function and attribute."""
        if obj.docstring is not None and obj.path.startswith(PACKAGE):
            obj.docstring.value = linked(as_markdown(obj.docstring.value), self.names)

    def on_module_members(self, *, mod: griffe.Module, **kwargs: object) -> None:
        """The module of a metric: what `evaluate` makes the docstring of its class."""
        if DESCRIPTIONS[1] in mod.members:
            words = "\n".join(ast.literal_eval(str(mod[name].value)) for name in DESCRIPTIONS)
            mod.docstring = griffe.Docstring(linked(as_markdown(words), self.names), parent=mod)
