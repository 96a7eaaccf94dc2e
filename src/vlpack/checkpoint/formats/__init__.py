"""The formats of quantized checkpoints: which stored tensors make up a weight, and which values these stand for.

`detect.py` reads what a checkpoint declares, one module per format lists its weights as `Packed`, and `unpacked.py`
presents the checkpoint as if it were not quantized, so that no other code needs to know.
"""

from vlpack.checkpoint.formats.detect import Declared, detect
from vlpack.checkpoint.formats.packed import Grid, Packed
from vlpack.checkpoint.formats.unpacked import Unpacked, unpacked

__all__ = ["Declared", "Grid", "Packed", "Unpacked", "detect", "unpacked"]
