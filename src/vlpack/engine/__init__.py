"""The engine: it answers many requests at once on plain onnxruntime (continuous batching).

Requests take slots of one shared key/value cache. A scheduler runs them, with sampling and constrained decoding.
"""

from vlpack.engine.constraints import Grammar
from vlpack.engine.counters import Counters
from vlpack.engine.engine import Engine, Occupancy
from vlpack.engine.queue import QueueFullError
from vlpack.engine.request import EngineAnswer, Handle
from vlpack.engine.scheduler import EngineStoppedError
from vlpack.runtime.sampler import TokenLogprob

__all__ = [
    "Counters",
    "Engine",
    "EngineAnswer",
    "EngineStoppedError",
    "Grammar",
    "Handle",
    "Occupancy",
    "QueueFullError",
    "TokenLogprob",
]
