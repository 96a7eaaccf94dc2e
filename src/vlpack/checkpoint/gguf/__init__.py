"""Checkpoints in GGUF files, the format of llama.cpp.

`header.py` reads the untrusted file, `types.py` has the layouts of quantized blocks, `names.py`, `settings.py` and
`tokenizer.py` translate to what a Hugging Face checkpoint has, and `checkpoint.py` puts these together.
"""

from vlpack.checkpoint.gguf.checkpoint import Gguf, gguf_in

__all__ = ["Gguf", "gguf_in"]
