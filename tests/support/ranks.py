"""Forked ranks for tests; see `megadiff.testing.ranks`."""

from megadiff.testing.ranks import on_ranks

__all__ = ["on_ranks"]
