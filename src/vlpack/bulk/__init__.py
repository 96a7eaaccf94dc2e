"""Batches: a question is answered about every row of a data set, with many rows at a time and each exactly once."""

from vlpack.bulk.progress import BatchResult, Progress
from vlpack.bulk.run import batch

__all__ = ["BatchResult", "Progress", "batch"]
