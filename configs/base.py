"""The fields that every config has, with their units. The other files here start from these and change some.

A config is data: `get_config` of a file returns it, flags such as `--config.optimizer.peak_lr=0.003` change single
fields, and a misspelt key is an error.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """A ConfigDict with every field of a run, at the paper's hyperparameters where they are known."""
    c = ConfigDict()
    c.seed = 0  # of parameters and of the data order
    c.context_length = 512  # tokens per sequence; must divide the dataset's record length
    c.batch_size = 256  # sequences per step, over all hosts
    c.steps = 524_288  # optimizer updates
    c.accumulation = 1  # parts that a batch is split into, one after the other, to save memory

    c.data = ConfigDict()
    c.data.path = ""  # folder made by `python -m data.prepare`

    c.model = ConfigDict()
    c.model.width = 12  # d of the paper: d layers, d heads of width 64, d_model = 64 d
    c.model.num_layers = 0  # layers; 0 means width
    c.model.num_heads = 0  # query heads; 0 means width
    c.model.num_kv_heads = 0  # key/value heads; 0 means as many as query heads
    c.model.vocab_size = 8192  # token ids; must be the dataset's
    c.model.selective = True  # False trains the standard transformer, all else equal
    c.model.selection = "paper"  # or an ablation: unprotected_bos, unprotected_self, leaky, own_head
    c.model.positions = "rotary"  # or "learned"; not stated by the paper: our choice
    c.model.qk_norm = True  # RMS-normalise queries and keys
    c.model.tied_embeddings = True  # input and output embedding are one matrix; not stated by the paper: our choice
    c.model.dtype = "bfloat16"  # of activations and matmuls, or "float32"; parameters are float32
    c.model.remat = "none"  # what the backward pass recomputes: "none", "dots" (all but matmuls), "block" (layers)
    c.model.scan_layers = True  # False compiles every layer apart: minutes slower to compile, faster steps
    c.model.attention = "auto"  # attention's implementation; "auto" is the platform's best

    c.memory_loss = ConfigDict()
    c.memory_loss.epsilon = 0.0  # weight of the auxiliary memory loss; 0 turns it off, the paper uses 0.1
    c.memory_loss.tau = 1.0  # F above which a token counts as forgotten, nats

    c.optimizer = ConfigDict()  # AdamW
    c.optimizer.peak_lr = 0.005  # learning rate after the warm-up
    c.optimizer.warmup_steps = 1_000  # steps of linear warm-up, from 0
    c.optimizer.final_lr_fraction = 0.0  # where the cosine decay ends, as a fraction of peak_lr; our choice
    c.optimizer.b1 = 0.9  # decay of the first moment, per step
    c.optimizer.b2 = 0.999  # decay of the second moment, per step
    c.optimizer.eps = 1e-8  # added to the root of the second moment
    c.optimizer.weight_decay = 0.0  # decoupled, times the learning rate, on matrices only; our choice
    c.optimizer.clip_norm = 1.0  # largest global norm of the gradient; 0 turns clipping off; our choice

    c.mesh = ConfigDict()  # devices along each axis; one of them may be -1: all that are left
    c.mesh.data = -1  # batch rows, parameters replicated; several slices extend this axis
    c.mesh.fsdp = 1  # batch rows, parameters sharded
    c.mesh.context = 1  # positions of the sequence
    c.mesh.tensor = 1  # heads, SwiGLU width and vocabulary
    c.mesh.topology = "v4-32"  # slice that these sizes are meant for: what launch.plan compiles for by default

    c.checkpoint = ConfigDict()
    c.checkpoint.every_steps = 1_000  # steps between checkpoints
    c.checkpoint.every_minutes = 30.0  # minutes after which one is made anyway; 0 goes by steps alone
    c.checkpoint.keep_last = 3  # newest checkpoints that are kept
    c.checkpoint.keep_every_steps = 50_000  # checkpoints at multiples of this are kept for good; 0 keeps none
    c.checkpoint.keep_best = 1  # checkpoints of lowest validation loss that are kept; 0 keeps none
    c.checkpoint.timeout_seconds = 600  # seconds after which a save in the background counts as failed

    c.eval = ConfigDict()
    c.eval.every_steps = 5_000  # steps between evaluations; the end of the run always evaluates the whole split
    c.eval.batches = 50  # validation batches of an evaluation on the way

    c.faults = ConfigDict()
    c.faults.max_bad_steps = 5  # updates in a row with bad numbers, each skipped, until the run rolls back
    c.faults.spike_factor = 0.0  # a loss above this times its running mean is bad too; 0 turns the rule off
    c.faults.check_replicas_every_steps = 1_000  # steps between comparisons of the parameters' replicas; 0: never
    c.faults.exit_seconds = 25.0  # from SIGTERM to exit at most, saving included; TPU VMs give 30
    c.faults.peer_timeout_seconds = 30  # silence after which a host counts as lost
    c.faults.start_timeout_seconds = 300  # for all hosts to join, at the start
    c.faults.step_timeout_seconds = 60.0  # a step may take this long, or
    c.faults.step_timeout_factor = 20.0  # this times the median step, before the host counts as hanging
    c.faults.first_step_timeout_seconds = 1_800.0  # the first step, evaluation batch and save, which may compile

    c.log_every_steps = 50  # steps between lines on the terminal; TensorBoard gets every step
    return c.lock()
