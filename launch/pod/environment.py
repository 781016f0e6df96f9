"""What the trainer finds in its environment: values, and secrets that each host fetches itself.

Both stand in `trainer.args` behind the flags, as lines that launch/worker.sh reads: `env NAME=VALUE` and
`secret NAME=projects/P/secrets/S/versions/V`. So other ones count as other flags do. A JobSet takes its secrets from
the cluster's own: NAME=SECRET:KEY.
"""

import re

from .options import PROJECT, SECRET, SECRET_NAME, Options, matches
from .terminal import UsageError, quoted

_NAME = "[A-Za-z_][A-Za-z0-9_]{0,99}"
_ID = "[A-Za-z0-9_-]{1,255}"
_RESOURCE = f"projects/({PROJECT}|[0-9]+)/secrets/{_ID}/versions/{_ID}"
# The launcher sets them, or they say what runs at all.
_RESERVED = ("HOME", "JAX_PLATFORMS", "LD_LIBRARY_PATH", "LD_PRELOAD", "PATH", "PYTHONHOME", "PYTHONPATH")


def check(given: Options) -> None:
    """--env and --secret; completes the names of secrets. Raises UsageError, which never shows a value."""
    names = [pair.partition("=")[0] for pair in given.env + given.secret]
    for option, pair in [("--env", pair) for pair in given.env] + [("--secret", pair) for pair in given.secret]:
        name, equals, _ = pair.partition("=")
        if not equals or not matches(name, _NAME):
            raise UsageError(f"{option}={quoted(name)} must be NAME=VALUE, the name of letters, digits and _")
        if name in _RESERVED:
            raise UsageError(f"{option}={name} is set by the launcher itself; leave it out")
        if names.count(name) > 1:
            raise UsageError(f"{option}={name} is given twice; leave one out")
    for pair in given.env:
        name, _, value = pair.partition("=")
        if re.search(r"[\x00-\x1f\x7f]", value):
            raise UsageError(f"--env={name} holds a control character; give each value on one line")
        if re.search(SECRET, value) or SECRET_NAME.search(name):
            raise UsageError(f"--env={name} looks like a secret, and is stored; give --secret {name}=ID")
    complete = _of_kubernetes if given.command == "render-jobset" else _complete
    given.secret = [complete(pair, given.project) for pair in given.secret]


def _complete(pair: str, project: str) -> str:
    name, _, secret = pair.partition("=")
    if matches(secret, f"{_ID}(:{_ID})?"):
        secret_id, _, version = secret.partition(":")
        secret = f"projects/{project}/secrets/{secret_id}/versions/{version or 'latest'}"
    if not matches(secret, _RESOURCE):  # it may be the secret itself, so it is not shown
        raise UsageError(
            f"--secret={name} names no secret of Secret Manager; give {name}=ID, {name}=ID:VERSION or "
            f"{name}=projects/P/secrets/ID/versions/VERSION"
        )
    return f"{name}={secret}"


def _of_kubernetes(pair: str, project: str) -> str:
    name, _, secret = pair.partition("=")
    if not matches(secret, "[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?:[A-Za-z0-9._-]{1,253}"):
        raise UsageError(f"--secret={name} names no key of a Kubernetes secret; give {name}=SECRET:KEY")
    return pair


def lines(given: Options) -> list[str]:
    """What `trainer.args` holds behind the flags."""
    return [f"env {pair}" for pair in given.env] + [f"secret {pair}" for pair in given.secret]
