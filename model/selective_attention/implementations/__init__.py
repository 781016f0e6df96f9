"""The implementations of selective attention, which all offer the same, and the choice among them."""

import jax

NAMES = ("reference", "xla", "pallas")


def implementation_name(implementation: str | None) -> str:
    """`implementation`, or for None the platform's best.

    Raises:
      ValueError: an unknown name.
    """
    if implementation is None:
        return "pallas" if jax.default_backend() == "tpu" else "xla"
    if implementation not in NAMES:
        known = ", ".join(map(repr, NAMES))
        raise ValueError(f"implementation={implementation!r} is unknown; choose {known} or None")
    return implementation
