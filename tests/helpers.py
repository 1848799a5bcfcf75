"""What several test modules share."""

from mvit_export.benchmarks.random_weights import randomize

__all__ = ["randomize"]
