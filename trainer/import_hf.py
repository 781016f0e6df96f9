"""Reads a pretrained model of Llama's family from a folder of Hugging Face's transformers.

    python -m trainer.import_hf FOLDER -o CHECKPOINT

FOLDER is what `save_pretrained` or a download leaves: Llama, Mistral without sliding window, or Qwen 3, in safetensors.
CHECKPOINT is what `trainer.export` writes, with the model's own tokenizer beside it: budgets, decoding and
`trainer.export CHECKPOINT --format=hf` take it. Attention is standard; nothing is fetched.
"""

import argparse
import os
import shutil
import sys
import uuid
from pathlib import Path

from selective_attention import export_safetensors
from trainer.errors import ConfigError
from trainer.huggingface.llama import read_folder
from trainer.huggingface.source import TOKENIZER_FILES


def import_folder(folder: Path, checkpoint: Path) -> None:
    """Writes the model in `folder` to `checkpoint`, which appears only when it is complete.

    Raises:
      ConfigError: `checkpoint` is not empty, or the model is one that cannot be represented.
      OSError: a file cannot be read or written.
    """
    if checkpoint.exists() and (not checkpoint.is_dir() or any(checkpoint.iterdir())):
        raise ConfigError(f"{checkpoint} is there and not empty; give --output a new folder")
    model = read_folder(folder)
    partial = checkpoint.with_name(f".partial-{uuid.uuid4().hex}")  # tempfile would keep others from reading it
    try:
        export_safetensors(model, partial)
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, partial / name)
        os.rename(partial, checkpoint)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m trainer.import_hf", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="with config.json and safetensors")
    parser.add_argument("-o", "--output", type=Path, required=True, help="new folder for the checkpoint")
    options = parser.parse_args()
    try:
        import_folder(options.folder, options.output)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(options.output)


if __name__ == "__main__":
    main()
