"""What several test modules share."""

from mvit_export.benchmarks.tables.random_weights import randomize

__all__ = ["randomize"]
