"""The code of a run: HEAD with the uncommitted changes of tracked files, as a tree of git."""

import dataclasses
import hashlib
import os
import subprocess
from pathlib import Path

from .gcloud import Gcloud
from .options import ROOT, SECRET
from .record import Run
from .terminal import BlockedError, UsageError, say

MAX_MEGABYTES = 100


@dataclasses.dataclass(frozen=True)
class Code:
    """A file that git does not track is not part of it: it might be anything, a key among other things."""

    tree: str
    commit: str
    archive: Path  # .tar.gz
    sha256: str  # of the archive
    patch: Path  # from the commit to the tree
    folder: Path  # the tree, extracted


def choose(temporary: Path, config: str, quiet: bool = False) -> Code:
    """Makes the tree, its archive and a copy of it in `temporary`.

    Raises:
      UsageError: there is no commit, a secret would be uploaded, the config is not part of it, or it is too large.
    """
    commit = _git("rev-parse", "--verify", "-q", "HEAD", check=False)
    if not commit:
        raise UsageError(
            f"{ROOT} is not a git checkout with a commit, so the run's code could not be recorded; "
            "git init, add and commit it"
        )
    index = temporary / "index"
    index.write_bytes((Path(_git("rev-parse", "--absolute-git-dir")) / "index").read_bytes())
    _git("add", "-u", index=index)
    tree = _git("write-tree", index=index)
    if found := _git("grep", "-l", "-I", "-E", SECRET, tree, "--", check=False):
        file = found.splitlines()[0].partition(":")[2]
        raise UsageError(f"{file} holds a key or token, which must not be uploaded; take it out of git")
    patch = temporary / "uncommitted.patch"
    with patch.open("wb") as output:
        subprocess.run(["git", "-C", str(ROOT), "diff", "--binary", commit, tree], stdout=output, check=True)
    # Lines that were taken out are in the patch still. As text alone: what a binary file looks like there is chance.
    text = subprocess.run(["git", "-C", str(ROOT), "diff", commit, tree], stdout=subprocess.PIPE, check=True).stdout
    if subprocess.run(["grep", "-a", "-q", "-E", SECRET], input=text).returncode == 0:
        raise UsageError(
            "the uncommitted changes take a key or token out, and are recorded with the run; commit them first"
        )
    untracked = _git("ls-files", "--others", "--exclude-standard").splitlines()
    if config in untracked or not _git("ls-tree", tree, "--", config):
        raise UsageError(f"{config} is not tracked by git, so it would not be part of the run; git add it")
    if not quiet and untracked:
        say(f"{len(untracked)} files that git does not track are not part of the run; git add those that are")
    if not quiet and tree != _git("rev-parse", "HEAD^{tree}"):
        say("uncommitted changes are part of the run and recorded with it")
    archive = _archive(temporary, tree)
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    return Code(tree, commit, archive, sha256, patch, temporary / "tree")


def _archive(temporary: Path, tree: str) -> Path:
    """The tree as a .tar.gz, which every host of every slice loads, and extracted beside it."""
    archive, folder = temporary / f"{tree}.tar.gz", temporary / "tree"
    try:
        _git("archive", "--format=tar.gz", "-o", str(archive), tree)
    except UsageError as error:
        raise BlockedError(f"git archive failed: {error}") from error
    megabytes = archive.stat().st_size >> 20
    if megabytes > MAX_MEGABYTES:
        sizes = [line.split(None, 4)[3:] for line in _git("ls-tree", "-r", "-l", tree).splitlines()]
        size, name = max((int(size), name) for size, name in sizes if size.isdigit())
        raise UsageError(
            f"the code is {megabytes} MB, of which every host loads a copy; at most {MAX_MEGABYTES} MB: the largest "
            f"file is {name} with {size >> 20} MB, take it out of git"
        )
    folder.mkdir()
    subprocess.run(["tar", "-xzf", str(archive), "-C", str(folder)], check=True)
    return archive


def upload(gcloud: Gcloud, run: Run, code: Code, arguments: Path) -> None:
    """The archive, the patch and the trainer's flags. Raises BlockedError."""
    for file, name, what in (
        (code.archive, f"code/{code.tree}.tar.gz", "code"),
        (code.patch, f"code/{code.tree}.patch", "patch"),
        (arguments, "trainer.args", "trainer's flags"),
    ):
        answer = gcloud.put_surely(file, f"{run.url}/{name}")
        if not answer.ok:
            raise BlockedError(f"cannot upload the {what}: {answer.reason}")


def _git(*arguments: str, index: Path | None = None, check: bool = True) -> str:
    environment = os.environ | ({"GIT_INDEX_FILE": str(index)} if index else {})
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], env=environment, capture_output=True, text=True)
    if check and done.returncode != 0:
        raise UsageError(f"git {arguments[0]} failed in {ROOT}: {done.stderr.strip()[-200:]}")
    return done.stdout.strip() if done.returncode == 0 else ""
