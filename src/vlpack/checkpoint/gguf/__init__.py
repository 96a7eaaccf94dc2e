"""Checkpoints in GGUF files, the format of llama.cpp.

`header.py` reads the untrusted file, `types.py` has the layouts of quantized blocks, `names.py`, `settings.py` and
`tokenizer.py` translate names, settings and tokenizer into those of a Hugging Face checkpoint, and `checkpoint.py`
combines them.
"""

from vlpack.checkpoint.gguf.checkpoint import Gguf, gguf_in

__all__ = ["Gguf", "gguf_in"]
