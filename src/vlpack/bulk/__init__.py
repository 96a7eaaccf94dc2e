"""Answers a question about every row of a data set with the engine: many rows at a time, each exactly once."""

from vlpack.bulk.run import BatchResult, Progress, batch

__all__ = ["BatchResult", "Progress", "batch"]
