"""What TensorBoard's plugins are told, as protocol buffers: texts, pictures, hyperparameters and the layout of charts.

TensorBoard's own functions for these need TensorFlow.
"""

import struct
import time
from collections.abc import Mapping

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as custom_scalar
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from tensorboard.plugins.hparams import metadata as hparams_plugin
from tensorboard.plugins.text import metadata as text_plugin

# The columns of the table of runs.
FINAL_METRICS = ("run/validation_bits_per_byte", "run/validation_perplexity", "run/validation_loss", "run/loss")
# The custom scalars, from the top: six charts that say how the run is, then what only this model has, then the weights.
LAYOUT: dict[str, dict[str, list[str]]] = {
    "The run": {
        "loss, nats per token": ["run/loss", "run/validation_loss"],
        "bits per byte": ["run/bits_per_byte", "run/validation_bits_per_byte"],
        "tokens per second": ["run/tokens_per_second"],
        "seconds of a step": ["run/step_seconds_median", "run/step_seconds_p99"],
        "goodput": ["run/goodput"],
        "norm of the gradient": ["weights/gradient_norm"],
    },
    "The selection, by layer": {
        "mean F, nats": ["selection_mean_f/.*"],
        "share of the context that is masked": ["selection_forgotten_fraction/.*"],
        "tokens kept, at most": ["selection_peak_memory/.*"],
    },
    "The weights, by layer and kind": {
        "norms of gradients": ["weights_gradient_norm/.*"],
        "norms of updates": ["weights_update_norm/.*"],
        "updates over parameters": ["weights_update_ratio/.*"],
    },
}


def text(name: str, markdown: str) -> Summary.Value:
    """For the text tab."""
    return Summary.Value(
        tag=name, metadata=text_plugin.create_summary_metadata(None, None), tensor=_string(markdown.encode())
    )


def image(name: str, png: bytes) -> Summary.Value:
    """For the images tab."""
    width, height = struct.unpack(">II", png[16:24])  # the first chunk of a PNG file
    picture = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=png)
    return Summary.Value(tag=name, image=picture)


def hparams(values: Mapping[str, bool | float | str]) -> list[Summary.Value]:
    """For the hparams tab: what its table has, and this run's row of it."""
    experiment = api_pb2.Experiment(
        hparam_infos=[api_pb2.HParamInfo(name=name, type=_type(value)) for name, value in values.items()],
        metric_infos=[api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in FINAL_METRICS],
        time_created_secs=time.time(),
    )
    start = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
    for name, value in values.items():
        if isinstance(value, bool):
            start.hparams[name].bool_value = value
        elif isinstance(value, str):
            start.hparams[name].string_value = value
        else:
            start.hparams[name].number_value = value
    data = plugin_data_pb2.HParamsPluginData
    return [
        _of_hparams(hparams_plugin.EXPERIMENT_TAG, data(experiment=experiment)),
        _of_hparams(hparams_plugin.SESSION_START_INFO_TAG, data(session_start_info=start)),
    ]


def layout() -> Summary.Value:
    """For the custom scalars tab."""
    categories = [
        layout_pb2.Category(
            title=title,
            chart=[layout_pb2.Chart(title=name, multiline=_lines(tags)) for name, tags in charts.items()],
        )
        for title, charts in LAYOUT.items()
    ]
    content = layout_pb2.Layout(category=categories).SerializeToString()
    metadata = custom_scalar.create_summary_metadata()
    return Summary.Value(tag=custom_scalar.CONFIG_SUMMARY_TAG, metadata=metadata, tensor=_string(content))


def _lines(tags: list[str]) -> layout_pb2.MultilineChartContent:
    return layout_pb2.MultilineChartContent(tag=[f"^{tag}$" for tag in tags])


def _type(value: bool | float | str) -> int:
    if isinstance(value, bool):
        return api_pb2.DATA_TYPE_BOOL
    return api_pb2.DATA_TYPE_STRING if isinstance(value, str) else api_pb2.DATA_TYPE_FLOAT64


def _of_hparams(tag: str, data: plugin_data_pb2.HParamsPluginData) -> Summary.Value:
    metadata: SummaryMetadata = hparams_plugin.create_summary_metadata(data)
    return Summary.Value(tag=tag, metadata=metadata, tensor=hparams_plugin.NULL_TENSOR)


def _string(value: bytes) -> TensorProto:
    return TensorProto(dtype=DT_STRING, string_val=[value], tensor_shape=TensorShapeProto())
