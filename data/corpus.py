"""The embedded default corpus: English documentation that every installation already holds, with no network.

    python -m data.corpus --output DIR

Sources are the docstrings of the standard library and of the pinned packages below, the language reference in
`pydoc_data.topics`, and the packages' long descriptions. Source files are parsed, never imported. The result has C4's
own format (gzipped JSON lines of `text`, `timestamp`, `url`), so that C4 takes exactly the same path from there on. It
is the same, byte for byte, each time it is built from one installation.
"""

import argparse
import ast
import gzip
import hashlib
import inspect
import io
import json
import multiprocessing
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from tqdm import tqdm

from data.errors import DataError, end
from data.sources import in_validation

# What the application itself needs, directly or not, and documents at length. The list is fixed so that installing an
# extra does not change the corpus.
DISTRIBUTIONS = (
    "absl-py",
    "cloudpickle",
    "etils",
    "flax",
    "fsspec",
    "grain",
    "grpcio",
    "humanize",
    "jax",
    "jaxlib",
    "markdown",
    "markdown-it-py",
    "ml-collections",
    "ml-dtypes",
    "numpy",
    "opt-einsum",
    "optax",
    "orbax-checkpoint",
    "packaging",
    "pillow",
    "prometheus-client",
    "protobuf",
    "psutil",
    "pygments",
    "rich",
    "scipy",
    "sentencepiece",
    "simplejson",
    "tensorboard",
    "tensorstore",
    "tqdm",
    "treescope",
    "typing-extensions",
    "werkzeug",
)
MINIMUM_BYTES = 8_000_000
VALIDATION_FRACTION = 0.03
TRAIN_FILES = 2
# Directories that hold no documentation, or, like site-packages inside the standard library, not this source's.
SKIPPED_DIRECTORIES = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "lib2to3",
    "_vendor",
}

_BLOCK_OPENERS = re.compile(r"::\s*$|^\s*\.\. (code|code-block|math|plot|parsed-literal|sourcecode)\b")
_RULE = re.compile(r"^\s*([-=~^*#+`'\"_.])\1{2,}\s*$")
_TABLE = re.compile(r"^\s*([|+]|[-=]{2,}\s+[-=]{2,})")
_DIRECTIVE = re.compile(r"^\s*(\.\. |:[a-z]+[ :]|@|\$|%|#!)")
_BULLET = re.compile(r"^\s*([-*+•]|\d+[.)]|\(\w\))\s+")
_ROLE = re.compile(r":[a-z:]+:(?=`)")
_WORD = re.compile(r"[\"'(`*\u201c\u2018]*[A-Za-z]+(['\u2019/-][A-Za-z]+)*[\"'`*\u201d\u2019]*[.,;:!?)]*")


class CorpusError(DataError):
    """The installation does not hold enough documentation to build the corpus."""


def prose(docstring: str) -> list[str]:
    """The paragraphs of English prose in a docstring, each on one line, without code, tables and bare signatures."""
    paragraphs: list[list[str]] = [[]]
    paragraph_indent = 0
    block_indent = None  # lines indented deeper than this belong to a literal block
    in_fence = in_doctest = False
    for line in inspect.cleandoc(docstring).splitlines():
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        if stripped.startswith(("```", "~~~")):
            in_fence = not in_fence
            paragraphs.append([])
            continue
        if not stripped:
            in_doctest = False
            paragraphs.append([])
            continue
        if block_indent is not None and indent <= block_indent:
            block_indent = None
        in_doctest = in_doctest or stripped.startswith((">>>", "In ["))
        if in_fence or in_doctest or block_indent is not None:
            continue
        if _BLOCK_OPENERS.search(line):
            block_indent = indent
        if _RULE.match(line):
            paragraphs[-1] = []  # the line above is a section's title
            continue
        if _TABLE.match(line) or _DIRECTIVE.match(line):
            paragraphs.append([])
            continue
        bullet = _BULLET.match(line)
        if bullet or indent != paragraph_indent:
            paragraphs.append([])
            paragraph_indent = len(bullet[0]) if bullet else indent  # a bullet's text goes on below its first word
        paragraphs[-1].append(_ROLE.sub("", stripped).replace("::", ":"))
    return [text for lines in paragraphs if is_prose(text := " ".join(" ".join(lines).split()))]


def is_prose(text: str) -> bool:
    """Whether a paragraph is mostly English words: five or more, and at least 70% of what stands between spaces."""
    parts = text.split()
    words = sum(_WORD.fullmatch(part) is not None for part in parts)
    return words >= 5 and words >= 0.7 * len(parts)


def source_documents(path: str, module: str) -> list[tuple[str, list[str]]]:
    """(url, paragraphs) of a file's documents: its own docstring, each function's, each class's with its methods'."""
    try:
        source = Path(path).read_bytes()
        if b'"""' not in source and b"'''" not in source:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escapes in other people's strings
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError):
        return []  # unreadable source documents nothing; the size check at the end guards the whole
    if module == "pydoc_data.topics":
        topics = next(node.value for node in tree.body if isinstance(node, ast.Assign))
        return [(f"pydoc:{name}", prose(text)) for name, text in sorted(ast.literal_eval(topics).items())]
    documents = [(f"pydoc:{module}", prose(ast.get_docstring(tree, clean=False) or ""))]
    for node in _definitions(tree):
        texts = [ast.get_docstring(child, clean=False) for child in (node, *_nested_definitions(node))]
        documents.append(
            (f"pydoc:{module}.{node.name}", [paragraph for text in texts if text for paragraph in prose(text)])
        )
    return documents


def _definitions(node: ast.AST) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child
        elif isinstance(child, (ast.If, ast.Try, ast.With)):
            yield from _definitions(child)


def _nested_definitions(node: ast.AST) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    for child in _definitions(node):
        yield child
        yield from _nested_definitions(child)


def _sources() -> list[tuple[str, str]]:
    """(path, module name) of every source file, in an order that depends only on names."""
    standard_library = Path(sysconfig.get_path("stdlib"))
    found = [(path, path.relative_to(standard_library)) for path in standard_library.rglob("*.py")]
    for name in DISTRIBUTIONS:
        try:
            files = metadata.distribution(name).files or []
        except metadata.PackageNotFoundError:
            raise CorpusError(f"the package {name} is not installed; run `make setup`") from None
        found += [(Path(file.locate()), Path(*file.parts)) for file in files if file.suffix in (".py", ".pyi")]
    kept = [(path, name) for path, name in found if not SKIPPED_DIRECTORIES & set(name.parts[:-1])]
    named = [(str(path), ".".join(name.with_suffix("").parts).removesuffix(".__init__")) for path, name in kept]
    return sorted(named, key=lambda source: (source[1], source[0]))


def corpus_documents() -> Iterator[tuple[str, str]]:
    """(url, text) of every document. A paragraph that occurred before is left out: no text stands in two documents."""
    sources = _sources()
    seen: set[bytes] = set()
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        results = pool.imap(_source_documents, sources, chunksize=32)
        parsed = (
            document for documents in tqdm(results, "corpus", len(sources), unit="file") for document in documents
        )
        for url, paragraphs in parsed:
            yield from _unseen(url, paragraphs, seen)
    for name in DISTRIBUTIONS:
        yield from _unseen(f"pypi:{name}", prose(metadata.metadata(name)["Description"] or ""), seen)


def _source_documents(source: tuple[str, str]) -> list[tuple[str, list[str]]]:
    return source_documents(*source)


def _unseen(url: str, paragraphs: list[str], seen: set[bytes]) -> Iterator[tuple[str, str]]:
    kept = []
    for paragraph in paragraphs:
        # Compared without digits, case and punctuation: `ndarray` methods and their copies differ in no more.
        key = hashlib.blake2b("".join(filter(str.isalpha, paragraph.lower())).encode(), digest_size=16).digest()
        if key not in seen:
            seen.add(key)
            kept.append(paragraph)
    if kept:
        yield url, "\n".join(kept)


def build(output: Path) -> dict[str, int]:
    """Writes the corpus into `output` and returns the bytes of text in each split ("train", "validation")."""
    names = [f"c4-train.{i:05d}-of-{TRAIN_FILES:05d}.json.gz" for i in range(TRAIN_FILES)]
    names.append("c4-validation.00000-of-00001.json.gz")
    lines: list[list[str]] = [[] for _ in names]
    sizes = {"train": 0, "validation": 0}
    # In the order of a hash, so that the start of a file is a fair sample of the whole.
    documents = sorted(corpus_documents(), key=lambda document: hashlib.blake2b(document[1].encode()).digest())
    for number, (url, text) in enumerate(documents):
        validation = in_validation(text, VALIDATION_FRACTION, purpose=b"")
        sizes["validation" if validation else "train"] += len(text.encode())
        # Documentation has no crawl date.
        line = json.dumps({"text": text, "timestamp": "", "url": url}, ensure_ascii=False)
        lines[-1 if validation else number % TRAIN_FILES].append(line + "\n")
    if sum(sizes.values()) < MINIMUM_BYTES:
        raise CorpusError(
            f"the installation holds {sum(sizes.values()):,} bytes of documentation, fewer than {MINIMUM_BYTES:,}: "
            "is the source of the standard library installed? (Python run with -OO, or from a zip file, has none.)"
        )
    output.mkdir(parents=True, exist_ok=True)
    for name, content in zip(names, lines, strict=True):
        buffer = io.BytesIO()
        with gzip.GzipFile(filename="", fileobj=buffer, mode="wb", mtime=0) as stream:  # no name, no time: same bytes
            stream.write("".join(content).encode())
        partial = output / f"{name}.partial"
        partial.write_bytes(buffer.getvalue())
        partial.replace(output / name)
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data.corpus", description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the c4-*.json.gz files")
    arguments = parser.parse_args()
    try:
        sizes = build(arguments.output)
    except CorpusError as error:
        end(error)
    print(", ".join(f"{split} {size / 1e6:.2f} MB" for split, size in sizes.items()), "of text in", arguments.output)


if __name__ == "__main__":
    main()
