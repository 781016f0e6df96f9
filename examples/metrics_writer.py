"""A run's metrics where you want them: a writer of your own, beside TensorBoard and metrics.jsonl.

python examples/metrics_writer.py
"""

import gzip
import json
import tempfile
from pathlib import Path

from configs import demo
from data import prepare
from trainer.loop import train
from trainer.metrics.writer import MetricsWriter
from trainer.settings import read_settings


class TableWriter(MetricsWriter):
    """Prints the losses; a service's client would take its place."""

    def write(self, step, scalars):
        for name, value in scalars.items():
            if name.endswith("loss") and "/layer_" not in name:
                print(f"{step:4}  {name:24} {value:.4f}")

    def withdraw(self, first_step):
        print(f"steps from {first_step} on are computed now, whatever was said of them before")


if __name__ == "__main__":
    folder = Path(tempfile.mkdtemp())
    text = "the mask of a token grows with every later query that finds it stale, so old words fade from view. "
    for split in ("train", "validation"):
        with gzip.open(folder / f"c4-{split}.json.gz", "wt") as stream:
            stream.writelines(json.dumps({"text": text * n}) + "\n" for n in range(1, 40))
    options = ["--vocab-size=290", "--record-length=32", "--workers=1"]
    prepare.main(["--source=c4", "--input", f"{folder}/c4-*.json.gz", f"--output={folder}/data", *options])
    config = demo.get_config()
    sizes = {"context_length": 32, "batch_size": 8, "steps": 6, "model.width": 1, "model.vocab_size": 290}
    where = {"data.path": f"{folder}/data", "mesh.data": -1, "mesh.fsdp": 1, "eval.every_steps": 3}
    config.update_from_flattened_dict(sizes | where)
    train(read_settings(config), f"{folder}/run", writers=[TableWriter()])
