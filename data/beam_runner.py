"""The stages of preparing text on Apache Beam: Dataflow, Flink, Spark, or Beam's own local runners."""

from collections.abc import Callable, Iterator

from tqdm import tqdm

from data.errors import DataError, WorkError
from data.workers import Task

try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
except ImportError:
    raise DataError("Apache Beam is not installed: pip install '.[beam]'") from None


def run_on_beam(
    function: Callable, tasks: list[Task], progress: tqdm, *, pipeline_arguments: list[str]
) -> Iterator[Task]:
    """Calls `function` with each task in one pipeline, and yields them all when it has ended.

    The workers need this project installed, and a folder that they all reach; results travel through that folder, so
    that a pipeline that failed is continued by running it again.

    Raises:
      WorkError: the pipeline fails.
    """
    if not tasks:
        return
    options = PipelineOptions(pipeline_arguments)
    try:
        with beam.Pipeline(options=options) as pipeline:
            # Without the reshuffle a runner may fuse both steps and give every task to one worker.
            _ = pipeline | beam.Create(tasks) | beam.Reshuffle() | beam.Map(lambda task: function(task, [0, 0]))
    except Exception as error:
        raise WorkError(
            f"the Beam pipeline failed: {error}; what is done is kept, run the same command again"
        ) from error
    for task in tasks:
        progress.update(task.size)
        yield task
