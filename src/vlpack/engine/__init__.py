"""Many requests at once on plain onnxruntime: slots of one cache, a scheduler, sampling and constraints."""

from vlpack.engine.constraints import Grammar
from vlpack.engine.engine import Engine, Occupancy
from vlpack.engine.queue import QueueFullError
from vlpack.engine.request import EngineAnswer, Handle
from vlpack.engine.sampler import TokenLogprob
from vlpack.engine.scheduler import Counters

__all__ = ["Counters", "Engine", "EngineAnswer", "Grammar", "Handle", "Occupancy", "QueueFullError", "TokenLogprob"]
