"""Batches: a question is answered about every row of a data set, with many rows at a time and each exactly once."""

from vlpack.bulk.run import BatchResult, Progress, batch

__all__ = ["BatchResult", "Progress", "batch"]
