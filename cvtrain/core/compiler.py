"""Keeping PyTorch's compiler out of where nothing is compiled."""

from __future__ import annotations


def spare(kind: type) -> None:
    """Keep PyTorch from importing its compiler, which takes 2 s, only to tell it to leave a class's methods alone.

    For classes whose methods nothing here compiles. Where PyTorch does not ask for this mark any more, it does nothing.

    Args:
        kind: A class of PyTorch with methods that are marked as not to be compiled (`torch._disable_dynamo`).
    """
    for method in vars(kind).values():
        plain = getattr(method, "__wrapped__", None)
        if plain is not None and not hasattr(plain, "__dynamo_disable"):
            plain.__dynamo_disable = plain
