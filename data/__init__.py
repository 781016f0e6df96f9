"""Raw text -> tokenizer -> ArrayRecord -> deterministic batches. See docs/data.md."""

from data.batches import EvalBatches, TrainBatches
from data.dataset import Dataset, open_dataset
from data.errors import DataError, UnreachableError
from data.manifest import Manifest
from data.spans import SpanBatches, SpanCorruption
from data.task_batches import TaskEvalBatches, TaskTrainBatches
from data.tasks import Task, find_task
from data.tokenizer import Tokenizer
from data.tokenizer_files import load_tokenizer

__all__ = [
    "DataError",
    "Dataset",
    "EvalBatches",
    "Manifest",
    "SpanBatches",
    "SpanCorruption",
    "Task",
    "TaskEvalBatches",
    "TaskTrainBatches",
    "Tokenizer",
    "TrainBatches",
    "UnreachableError",
    "find_task",
    "load_tokenizer",
    "open_dataset",
]
