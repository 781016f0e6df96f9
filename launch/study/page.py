"""What the page is made of, and how it is written: HTML that stands alone, or Markdown with a folder of pictures."""

import dataclasses
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from launch import charts


@dataclasses.dataclass(frozen=True)
class Heading:
    """Of a section, or with `small` of a part of one."""

    text: str
    small: bool = False


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph; what stands between backticks is code."""

    text: str


@dataclasses.dataclass(frozen=True)
class Command:
    """Commands that made what stands above, one a line."""

    text: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Its first column says what a row is about."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    is_prose: bool = False  # whether its cells are sentences


@dataclasses.dataclass(frozen=True)
class Figure:
    """A chart of `launch.charts`."""

    name: str  # of its file
    says: str
    svg: str


Block = Heading | Text | Command | Table | Figure
_STYLE = """
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 24px 16px 64px;
  background: var(--back); color: var(--ink) }
h1 { font-size: 26px } h2 { font-size: 20px; margin: 44px 0 10px } h3 { font-size: 16px; margin: 24px 0 6px }
.scroll { overflow-x: auto; margin: 10px 0 }
svg { display: block; width: 100%; min-width: 560px } text { fill: var(--soft) }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px }
th, td { text-align: right; padding: 6px 0 6px 16px; border-bottom: 1px solid var(--line); vertical-align: top }
th { color: var(--soft); font-weight: 500 } th:first-child, td:first-child { text-align: left; padding-left: 0 }
.prose th, .prose td { text-align: left; min-width: 7rem }
@media (max-width: 40rem) {
  .prose, .prose tbody, .prose tr, .prose td { display: block; padding-left: 0; border: 0 }
  .prose tr { border-bottom: 1px solid var(--line); padding: 8px 0 } .prose tr:first-child { display: none }
  .prose td { padding: 2px 0 } .prose td:first-child { font-weight: 600 }
  .prose td:nth-child(n + 3) { color: var(--soft) } }
figure { margin: 14px 0 } figcaption { color: var(--soft); font-size: 14px }
code, pre { font: 13px/1.5 ui-monospace, monospace } code { overflow-wrap: anywhere }
pre { white-space: pre-wrap; overflow-wrap: anywhere; color: var(--soft); margin: 8px 0 }
"""
_CODE, _LINK = re.compile("`([^`]*)`"), re.compile(r"\[([^]]*)\]\([^)]*\)")


def as_html(title: str, blocks: Sequence[Block]) -> str:
    """The whole page."""
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<meta name=color-scheme content='light dark'><style>{charts.palette()}{_STYLE}</style>"
        f"<h1>{escape(title)}</h1>{''.join(map(_html, blocks))}</html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading(text, small):
            level = "h3" if small else "h2"
            return f"<{level}>{escape(text)}</{level}>"
        case Text(text):
            marked = _CODE.sub(r"<code>\1</code>", escape(text))
            unlinked = _LINK.sub(r"\1", marked)  # what it leads to is not beside the page
            return f"<p>{unlinked}</p>"
        case Command(text):
            return f"<pre>{escape(text)}</pre>"
        case Figure(_, says, svg):
            return f"<figure><figcaption>{escape(says)}</figcaption><div class=scroll>{svg}</div></figure>"
        case Table(headings, rows, is_prose):
            head = "".join(f"<th>{escape(heading)}" for heading in headings)
            body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}' for cell in row)}" for row in rows)
            css = " class=prose" if is_prose else ""
            return f"<div class=scroll><table{css}><tr>{head}{body}</table></div>"


def as_markdown(title: str, blocks: Sequence[Block], folder: str) -> str:
    """The same, with its figures in `folder`, which is beside it."""
    return f"# {title}\n\n" + "\n\n".join(_markdown(block, folder) for block in blocks) + "\n"


def _markdown(block: Block, folder: str) -> str:
    match block:
        case Heading(text, small):
            return f"{'###' if small else '##'} {text}"
        case Text(text):
            return _plain(text)
        case Command(text):
            return f"```sh\n{text}\n```"
        case Figure(name, says, _):
            return f"![{says}]({folder}/{name}.svg)\n\n*{says}*"
        case Table(headings, rows, _):
            lines = [[_plain(cell) for cell in row] for row in (headings, *rows)]
            lines.insert(1, ["---"] * len(headings))
            return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """What Markdown shows as this text, in a table too."""
    return text.replace("<", "&lt;").replace("*", r"\*").replace("|", r"\|")


def write_html(path: Path, title: str, blocks: Sequence[Block]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_html(title, blocks), encoding="utf-8")


def write_markdown(path: Path, title: str, blocks: Sequence[Block]) -> None:
    """Writes the page, and its figures into the folder of its name beside it."""
    pictures = path.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    for old in pictures.glob("*.svg"):
        old.unlink()
    for block in blocks:
        if isinstance(block, Figure):
            (pictures / f"{block.name}.svg").write_text(standalone(block.svg), encoding="utf-8")
    path.write_text(as_markdown(title, blocks, pictures.name), encoding="utf-8")


def standalone(svg: str) -> str:
    """A chart as a file of its own, in its own colours, light or dark."""
    style = f"<style>{charts.palette()} text {{ fill: var(--soft) }}</style>"
    back = "<rect width='100%' height='100%' style='fill: var(--back)'/>"
    head, _, rest = svg.partition(">")
    head = head.replace("<svg ", "<svg xmlns='http://www.w3.org/2000/svg' ", 1).replace("role=img", "role='img'")
    return f"{head}>{style}{back}{rest}\n"
