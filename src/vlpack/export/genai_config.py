"""Writes ``genai_config.json``, which describes graphs, tokens and search settings for onnxruntime-genai."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlpack.architectures.base import Architecture
from vlpack.checkpoint.config import Section
from vlpack.errors import CheckpointError, option

DEFAULT_MAX_LENGTH = 4096
"""Default limit of prompt and answer in tokens. The runtime allocates the key/value cache for this many, so it is
shorter than the context length."""

_CANNOT: dict[str, Any] = {
    **dict.fromkeys(("min_p", "epsilon_cutoff", "eta_cutoff", "presence_penalty", "frequency_penalty"), 0),
    **dict.fromkeys(("top_h", "typical_p", "encoder_repetition_penalty", "guidance_scale"), 1),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), 1),
    **dict.fromkeys(("diversity_penalty", "penalty_alpha", "encoder_no_repeat_ngram_size", "min_new_tokens"), 0),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "constraints")),
    **dict.fromkeys(("sequence_bias", "logit_bias", "forced_bos_token_id", "forced_eos_token_id", "stop_strings")),
    **dict.fromkeys(("exponential_decay_length_penalty", "watermarking_config", "dola_layers", "token_healing")),
}
"""Generation settings that the runtime does not support, or (beams) not together with images and streaming, and the
value of each that has no effect, if there is one besides null."""

_TRANSFORMERS_DEFAULT_MAX_LENGTH = 20
"""The ``max_length`` that transformers treats as not set."""


def genai_config(
    architecture: Architecture,
    files: Mapping[str, str],
    provider: str,
    config: Section,
    generation: Mapping[str, Any],
    shared_cache: bool,
    cache_channels: int,
) -> dict[str, Any]:
    """The configuration as JSON data.

    Args:
        architecture: the model's architecture, with sizes and token ids.
        files: part name → file name of each graph in the package.
        provider: the execution provider.
        config: the checkpoint's config.json.
        generation: the checkpoint's generation_config.json; empty if there is none.
        shared_cache: whether the decoder can write new keys and values into the buffer of the old ones.
        cache_channels: number of channels of a head in the cache's inputs and outputs.

    Raises:
        CheckpointError: a token id or a search setting is not usable.
    """
    session = {"log_id": "onnxruntime-genai", "provider_options": [] if provider == "cpu" else [{provider: {}}]}
    text = config.section("text_config", required=False)
    model: dict[str, Any] = {
        "type": architecture.genai_text_type if "text" in files else architecture.genai_type,
        **_token_ids(text, config, generation, architecture.text.vocab_size),
        "context_length": architecture.text.context_length,
        "vocab_size": architecture.text.vocab_size,
    }
    if "text" in files or "decoder" in files:
        model["decoder"] = _decoder(architecture, files, session, cache_channels)
    if "vision" in files:
        model["vision"] = _vision(architecture, files["vision"], session)
    if "embedding" in files:
        model["embedding"] = {
            # a lookup needs one thread; more would spin between tokens and take cores from the decoder
            "session_options": {"intra_op_num_threads": 1, **session},
            "filename": files["embedding"],
            "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
            "outputs": {"inputs_embeds": "inputs_embeds", **architecture.deepstack.genai_names()},
        }
    if "text" not in files and architecture.vision is not None:
        facts = architecture.vision
        if max(facts.image_token_id, facts.video_token_id, facts.vision_start_token_id) >= architecture.text.vocab_size:
            raise CheckpointError(f"{config.where}: the id of an image or video token is outside the vocabulary.")
        model |= {
            "image_token_id": facts.image_token_id,
            "video_token_id": facts.video_token_id,
            "vision_start_token_id": facts.vision_start_token_id,
        }
    search = _search(architecture, generation, shared_cache)
    if provider == "cpu":
        search["chunk_size"] = CHUNK_SIZE
    return {"model": model, "search": search}


CHUNK_SIZE = 512
"""Number of prompt tokens that the decoder processes in one call. Attention on the CPU computes all scores of a call,
also those that the causal mask removes: 2048 tokens in one call are a fifth slower than in four calls, and need more
memory."""


def _decoder(
    architecture: Architecture, files: Mapping[str, str], session: dict[str, Any], cache_channels: int
) -> dict[str, Any]:
    text = architecture.text
    if "text" in files:
        tokens = {"input_ids": "input_ids"}
    else:
        tokens = {"inputs_embeds": "inputs_embeds", **architecture.deepstack.genai_names()}
    states = {"conv": "conv_state", "recurrent": "recurrent_state"} if text.linear_layers else {}
    return {
        "session_options": session,
        "filename": files.get("text") or files["decoder"],
        "head_size": cache_channels,
        "hidden_size": text.hidden_size,
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": text.num_hidden_layers,
        "num_key_value_heads": text.num_key_value_heads,
        "inputs": {
            **tokens,
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
            **{f"past_{kind}_names": f"past_key_values.%d.{name}" for kind, name in states.items()},
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
            **{f"present_{kind}_names": f"present.%d.{name}" for kind, name in states.items()},
        },
    }


def _vision(architecture: Architecture, filename: str, session: dict[str, Any]) -> dict[str, Any]:
    facts = architecture.vision
    assert facts is not None, "a package with a vision graph has a vision encoder"
    return {
        "session_options": session,
        "filename": filename,
        "config_filename": "processor_config.json",
        "spatial_merge_size": facts.spatial_merge_size,
        "tokens_per_second": facts.tokens_per_second,
        "patch_size": facts.patch_size,
        # the runtime's default name of the grid is that of another model
        "inputs": {"pixel_values": "pixel_values", "image_grid_thw": "image_grid_thw"},
        "outputs": {"image_features": "image_features"},
    }


def _token_ids(text: Section, config: Section, generation: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """The BOS, EOS and padding ids. generation_config.json overrides config.json, and several EOS ids are kept."""

    def first(name: str) -> Any:
        for values in (generation, config.values, text.values):
            if values.get(name) is not None:
                return values[name]
        return None

    ids = Section({name: first(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}, config.where)
    if "eos_token_id" not in ids:
        raise CheckpointError(
            "The checkpoint does not say which token ends an answer: neither generation_config.json nor config.json "
            "has an eos_token_id. (In a GGUF file, the metadata has neither tokenizer.ggml.eos_token_id nor a control "
            "token such as <|im_end|>.)",
            'Put generation_config.json with {"eos_token_id": …}, the id of that token, into the folder of the '
            "checkpoint, or into one folder with the GGUF file, and give the folder.",
        )
    eos = ids.integers("eos_token_id", high=vocab_size - 1)
    if not eos:
        raise CheckpointError(f"{config.where}: 'eos_token_id' is an empty list, so no answer would ever end.")
    known: dict[str, Any] = {"eos_token_id": eos if len(eos) > 1 else eos[0]}
    # the runtime's default, 0, is an ordinary token in Qwen's vocabulary
    known["pad_token_id"] = ids.integer("pad_token_id", eos[-1], low=0, high=vocab_size - 1)
    known["bos_token_id"] = ids.integer("bos_token_id", known["pad_token_id"], low=0, high=vocab_size - 1)
    return known


def search_notes(generation: Mapping[str, Any]) -> list[str]:
    """Notes for the user on settings of generation_config.json that a package cannot hold."""
    lost = [name for name, neutral in _CANNOT.items() if _says(generation.get(name), neutral)]
    notes = []
    if lost:
        notes.append(
            f"generation_config.json sets {', '.join(lost)}, which onnxruntime-genai does not support here: answers "
            "may differ from those of programs that support it."
        )
    limits = [name for name in ("max_new_tokens", "max_time") if _says(generation.get(name), None)]
    if limits:
        notes.append(
            f"A package cannot hold {' and '.join(limits)} of generation_config.json. Limit answers with "
            f"{option('max_tokens')}, or with max_length of the runtime's search options."
        )
    return notes


def _says(value: Any, neutral: Any) -> bool:
    """Whether a setting differs from ``neutral`` and is not empty; 0 and 1 count as values (token ids)."""
    return value is not None and value is not False and value != neutral and value not in ([], {}, "")


def _search(architecture: Architecture, generation: Mapping[str, Any], shared_cache: bool) -> dict[str, Any]:
    values = Section(generation, "generation_config.json")
    greedy = generation.get("temperature") == 0  # transformers also takes it for greedy search, with a warning
    top_p = values.number("top_p", 1.0)
    if top_p > 1:
        raise CheckpointError(f"generation_config.json: 'top_p' is {top_p}; it must be at most 1.")
    max_length = values.integer("max_length", DEFAULT_MAX_LENGTH)
    if max_length == _TRANSFORMERS_DEFAULT_MAX_LENGTH:
        max_length = DEFAULT_MAX_LENGTH
    return {
        "max_length": min(architecture.text.context_length, max_length, DEFAULT_MAX_LENGTH),
        "min_length": values.integer("min_length", 0, low=0),  # counts prompt and answer, as in transformers
        "num_beams": 1,
        "num_return_sequences": 1,
        "do_sample": values.flag("do_sample", False) and not greedy,
        "temperature": 1.0 if greedy else values.number("temperature", 1.0),
        # 0 means all tokens; the runtime refuses more than the vocabulary has
        "top_k": min(values.integer("top_k", 50, low=0), architecture.text.vocab_size),
        "top_p": top_p,
        "repetition_penalty": values.number("repetition_penalty", 1.0),
        "length_penalty": 1.0,
        "diversity_penalty": 0.0,
        "no_repeat_ngram_size": values.integer("no_repeat_ngram_size", 0, low=0),
        "early_stopping": True,
        "past_present_share_buffer": shared_cache,
    }
