"""Which part of a decode step an operation belongs to, by the scope of the model's code in which it was traced."""

from launch.plan.hlo import Operation
from launch.plan.times import MOVES, kernel_body

CACHE = "attention over the cache"  # with evicting, writing and the policy's bookkeeping
LOGITS = "logits and sampling"
MEMORY = "waiting for memory"  # what the other parts leave of the time in which weights and cache can be read
PARTS = (CACHE, "matmuls", "other kernels", "elementwise in layers", LOGITS, "data movement", "collectives", MEMORY)


def part_of(operation: Operation) -> str:
    """One of PARTS."""
    where = operation.instruction.op_name
    if "/cache/" in where:
        return CACHE
    if kernel_body(operation):
        return "other kernels"
    in_layer = "/attention/" in where or "/mlp/" in where
    if operation.flops:
        return "matmuls" if in_layer else LOGITS
    if {i.opcode for i in operation.everything()} <= MOVES:
        return "data movement"
    return "elementwise in layers" if in_layer else LOGITS
