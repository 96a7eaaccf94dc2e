"""Many requests at once on plain onnxruntime: slots of one cache, a scheduler, sampling and constraints."""

from vlpack.engine.constraints import Grammar
from vlpack.engine.counters import Counters
from vlpack.engine.engine import Engine
from vlpack.engine.queue import QueueFullError
from vlpack.engine.request import EngineAnswer, Handle
from vlpack.engine.sampler import TokenLogprob

__all__ = ["Counters", "Engine", "EngineAnswer", "Grammar", "Handle", "QueueFullError", "TokenLogprob"]
