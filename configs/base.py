"""The fields that every config has, with their units. The other files here start from these and change some.

A config is data: `get_config` of a file returns it, flags such as `--config.optimizer.peak_lr=0.003` change single
fields, and a misspelt key is an error.

A field is one line: its type, with the range that is checked (`Positive`, `NotNegative`); its default; what it means
and its unit. `Free` marks what a resumed run may change, since it touches neither the mathematics nor the order of the
data; every other field must be the checkpoint's. `trainer.settings` reads a config back into these classes.
"""

import dataclasses
from typing import Annotated, TypeVar

from ml_collections import ConfigDict

T = TypeVar("T")
POSITIVE, NOT_NEGATIVE, FREE = "positive", "0 or more", "free on resume"
Positive = Annotated[T, POSITIVE]
NotNegative = Annotated[T, NOT_NEGATIVE]
Free = Annotated[T, FREE]


@dataclasses.dataclass(frozen=True)
class Corruption:
    """The blanks that an encoder-decoder fills; the values are T5's."""

    rate: float = 0.15  # share of a window's tokens that are left out
    mean_span: float = 3.0  # mean length of a blank, tokens


@dataclasses.dataclass(frozen=True)
class Data:
    """Where the tokens come from."""

    path: Free[str] = ""  # folder made by `python -m data.prepare`; a checkpoint knows the dataset by its fingerprint
    task: str = ""  # "assignment" or "parity": sequences that are made up (data/tasks.py) instead of a dataset's
    task_names: Positive[int] = 8  # of assignment: names that are given values
    task_values: Positive[int] = 16  # of assignment: values
    task_queries: Positive[int] = 8  # of assignment: names that are asked for, in every sequence
    corruption: Corruption = Corruption()


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """How rotary frequencies are slowed down: what `selective_attention.RotaryScaling` is made from."""

    kind: str = "none"  # or "linear", "llama3"
    factor: float = 1.0  # by which they are divided
    low_frequency_factor: float = 1.0  # of llama3, as the others: turns within original_length, below which all are
    high_frequency_factor: float = 4.0  # turns from which none are
    original_length: int = 8192  # tokens


@dataclasses.dataclass(frozen=True)
class Model:
    """What `selective_attention.TransformerConfig` is made from."""

    architecture: str = "decoder"  # or "encoder_decoder", which fills blanks in its contexts (data/spans.py)
    width: int = 12  # d of the paper: d layers, d heads of width 64, d_model = 64 d
    num_layers: int = 0  # layers; 0 means width
    num_heads: int = 0  # query heads; 0 means width
    num_kv_heads: int = 0  # key/value heads; 0 means as many as query heads
    d_model: int = 0  # width of the residual stream; 0 means 64 x width
    mlp_dim: int = 0  # hidden width of SwiGLU; 0 means 8/3 x 64 x width, rounded up to a multiple of 128
    head_dim: int = 64  # width of a head
    vocab_size: int = 8192  # token ids; at least the dataset's, and one more than blanks for an encoder-decoder
    selective: bool = True  # False trains the standard transformer, all else equal
    selection: str = "paper"  # or an ablation: unprotected_bos, unprotected_self, leaky, own_head
    positions: str = "rotary"  # or "learned"; not stated by the paper: our choice
    rotary_base: float = 10_000.0  # wavelength base of rotary positions; not stated by the paper: our choice
    rotary_scaling: RotaryScaling = RotaryScaling()
    norm_epsilon: float = 1e-6  # added to the mean square that RMSNorm divides by
    qk_norm: bool = True  # RMS-normalise queries and keys
    tied_embeddings: bool = True  # input and output embedding are one matrix; not stated by the paper: our choice
    dtype: str = "bfloat16"  # of activations and matmuls, or "float32"; parameters are float32
    remat: Free[str] = "none"  # what the backward pass recomputes: "none", "dots" (all but matmuls), "block" (layers)
    scan_layers: Free[bool] = False  # True compiles one layer for all: sooner to compile, slower steps on TPUs
    attention: Free[str] = "auto"  # attention's implementation; "auto" is the platform's best


@dataclasses.dataclass(frozen=True)
class MemoryLoss:
    """The paper's auxiliary loss."""

    epsilon: float = 0.0  # weight of the auxiliary memory loss; 0 turns it off, the paper uses 0.1
    tau: Positive[float] = 1.0  # F above which a token counts as forgotten, nats


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW."""

    peak_lr: float = 0.005  # learning rate after the warm-up
    warmup_steps: int = 1_000  # steps of linear warm-up, from 0
    final_lr_fraction: float = 0.0  # where the cosine decay ends, as a fraction of peak_lr; our choice
    b1: float = 0.9  # decay of the first moment, per step
    b2: float = 0.999  # decay of the second moment, per step
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.0  # decoupled, times the learning rate, on matrices only; our choice
    clip_norm: float = 1.0  # largest global norm of the gradient; 0 turns clipping off; our choice


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis; one of them may be -1: all that are left."""

    data: int = -1  # batch rows, parameters replicated; several slices extend this axis
    fsdp: int = 1  # batch rows, parameters sharded; with data=-1 no more than a slice has
    context: int = 1  # positions of the sequence
    tensor: int = 1  # heads, SwiGLU width and vocabulary
    topology: str = "v4-32"  # slice that these sizes are meant for: what launch.plan compiles for by default


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When to save, and what to keep."""

    every_steps: Positive[int] = 1_000  # steps between checkpoints
    every_minutes: NotNegative[float] = 30.0  # minutes after which one is made anyway; 0 goes by steps alone
    keep_last: Positive[int] = 3  # newest checkpoints that are kept
    keep_every_steps: NotNegative[int] = 50_000  # checkpoints at multiples of this are kept for good; 0 keeps none
    keep_best: NotNegative[int] = 1  # checkpoints of lowest validation loss that are kept; 0 keeps none
    local_folder: str = ""  # on each host, e.g. /dev/shm, for copies of its part of the state; empty: none are made
    local_every_steps: Positive[int] = 100  # steps between these copies
    timeout_seconds: Positive[int] = 600  # seconds after which a save in the background counts as failed


@dataclasses.dataclass(frozen=True)
class Eval:
    """Evaluation on the way; the end of the run always evaluates the whole split."""

    every_steps: Positive[int] = 5_000  # steps between evaluations
    batches: Positive[int] = 50  # validation batches of an evaluation on the way
    pictures: bool = True  # draw what is masked, by layer and over a text, for TensorBoard


@dataclasses.dataclass(frozen=True)
class Faults:
    """What counts as a fault, and how long to wait."""

    max_bad_steps: Positive[int] = 5  # updates in a row with bad numbers, each skipped, until the run rolls back
    spike_factor: NotNegative[float] = 0.0  # a loss above this times its running mean is bad too; 0 turns the rule off
    check_replicas_every_steps: Free[NotNegative[int]] = 1_000  # steps between comparing parameters' replicas; 0: never
    exit_seconds: Free[Positive[float]] = 25.0  # from SIGTERM to exit at most, saving included; TPU VMs give 30
    peer_timeout_seconds: Free[Positive[int]] = 30  # silence after which a host counts as lost
    start_timeout_seconds: Free[Positive[int]] = 300  # for all hosts to join, at the start
    storage_retry_seconds: Free[NotNegative[float]] = (
        30.0  # to try again what storage refuses to read, or to start with
    )
    step_timeout_seconds: Free[Positive[float]] = 60.0  # a step may take this long, or
    step_timeout_factor: Free[Positive[float]] = 20.0  # this times the median step, before the host counts as hanging
    first_step_timeout_seconds: Free[Positive[float]] = 1_800.0  # compiling, and the first step, eval batch and save


@dataclasses.dataclass(frozen=True)
class Config:
    """Every field of a run, at the paper's hyperparameters where they are known."""

    seed: int = 0  # of parameters and of the data order
    context_length: Positive[int] = 512  # tokens per sequence; must divide the dataset's record length
    batch_size: Positive[int] = 256  # sequences per step, over all hosts
    steps: Positive[int] = 524_288  # optimizer updates
    accumulation: Free[Positive[int]] = 1  # parts that a batch is split into, one after the other, to save memory
    data: Data = Data()
    model: Model = Model()
    memory_loss: MemoryLoss = MemoryLoss()
    optimizer: Optimizer = Optimizer()
    mesh: Free[Mesh] = Mesh()
    checkpoint: Free[Checkpoint] = Checkpoint()
    eval: Free[Eval] = Eval()
    faults: Faults = Faults()
    compilation_cache: Free[str] = ""  # folder of compiled programs, which are native code; "": see docs/training.md
    log_every_steps: Free[Positive[int]] = 50  # steps between lines on the terminal; TensorBoard gets every step


def get_config() -> ConfigDict:
    """All fields at their defaults."""
    return ConfigDict(dataclasses.asdict(Config())).lock()
