"""Exports a run's newest checkpoint for other programs, in the format of `selective_attention.export_safetensors`.

    python -m trainer.export --workdir=DIR [--output=FOLDER]

By default into DIR/export/STEP, where a checkpoint that was exported before is left as it is. Prints the folder.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from selective_attention import export_safetensors
from trainer.checkpoints.manager import load_model
from trainer.errors import ResumeError


def export(workdir: str, output: str | None = None) -> Path:
    """Writes the model and returns its folder, which appears only when it is complete.

    Raises:
      ResumeError: there is no checkpoint.
    """
    model, _, step = load_model(workdir)
    folder = Path(output) if output else Path(workdir) / "export" / str(step)
    if output is None and folder.exists():
        return folder
    if output is not None:
        export_safetensors(model, folder)
        return folder
    folder.parent.mkdir(exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
    export_safetensors(model, partial)
    try:
        os.rename(partial, folder)
    except OSError:  # another process was quicker
        if not folder.exists():
            raise
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m trainer.export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--output")
    options = parser.parse_args()
    try:
        print(export(options.workdir, options.output))
    except (ResumeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
