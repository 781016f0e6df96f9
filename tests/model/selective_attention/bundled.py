"""An implementation's functions, called with the fields of their bundles as keyword arguments."""

import dataclasses

from selective_attention.selection import Projections, Rule, Seen


def attend(implementation, q, k, v, q_sel, k_sel, f_start, **options):
    """`implementation.attend`."""
    return implementation.attend(Projections(q, k, v, q_sel, k_sel), f_start, *bundles(options))


def column_sums(implementation, q_sel, k_sel, **options):
    """`implementation.column_sums`."""
    return implementation.column_sums(q_sel, k_sel, *bundles(options))


def bundles(options):
    """The options, each in the bundle that has a field of its name."""
    of_seen = {field.name for field in dataclasses.fields(Seen)} & options.keys()
    return Seen(**{name: options[name] for name in of_seen}), Rule(
        **{name: options[name] for name in options.keys() - of_seen}
    )
