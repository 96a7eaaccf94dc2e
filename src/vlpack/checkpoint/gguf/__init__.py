"""Checkpoints in GGUF files, the format of llama.cpp.

`header.py` reads the untrusted file, `types.py` has the layouts of quantized blocks, `names.py`, `settings.py` and
`tokenizer.py` translate names, settings and tokenizer into those of a Hugging Face checkpoint, `vision_names.py`,
`joined.py` and `vision.py` do so for the file of a vision encoder, `places.py` finds the files, and `checkpoint.py`
combines them.
"""

from vlpack.checkpoint.gguf.checkpoint import Gguf
from vlpack.checkpoint.gguf.places import check_mmproj, gguf_in

__all__ = ["Gguf", "check_mmproj", "gguf_in"]
