"""Tiny embedding models and rerankers, and reference results by transformers and the recipes that QwenLM publishes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from family import Member, make_member
from tiny import IMAGE, Tiny, make_checkpoint

END = "<|endoftext|>"
PAD = "<|image_pad|>"
YES, NO = 2046, 2047
AREA = 256
"""Area in pixels of an image token of the tiny vision encoder."""

TEXT = Member("Qwen3 tied", "Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 32}, tied=True)
BIASED = Member("Qwen3 biased", "Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 16, "attention_bias": True})
EMBEDDING_STEPS = ("models.Transformer", "models.Pooling", "models.Normalize")
RERANKER_STEPS = ("base.modules.Transformer", "cross_encoder.modules.LogitScore")


def make_text(folder: Path, member: Member = TEXT) -> Path:
    """Makes a text checkpoint whose tokenizer knows yes and no and adds an end token, like Qwen3-Embedding's."""
    from safetensors.numpy import load_file, save_file

    make_member(folder, member)
    if not member.tied:  # with unchanged rows all scores would be close to 1
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"][[YES, NO]] *= 0.1
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return _finish(folder, ends=True)


def make_vision(folder: Path, **settings: Any) -> Path:
    """Makes a vision-language checkpoint whose tokenizer has the tokens yes and no."""
    return _finish(make_checkpoint(folder, Tiny(**{"seed": 4, **settings})), ends=False)


def _finish(folder: Path, *, ends: bool) -> Path:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    # they replace the last two words, because transformers numbers special tokens from the vocabulary's size on
    words = [word for word, number in tokenizer["model"]["vocab"].items() if number not in (YES, NO)]
    tokenizer["model"]["vocab"] = {word: number for number, word in enumerate([*words, "yes", "no"])}
    tokenizer["model"]["merges"][-2:] = [["y", "es"], ["n", "o"]]
    if ends:
        end = {"SpecialToken": {"id": END, "type_id": 0}}
        text = {"Sequence": {"id": "A", "type_id": 0}}
        special = {END: {"id": END, "ids": [2048], "tokens": [END]}}
        template = {"type": "TemplateProcessing", "single": [text, end], "pair": [text, end], "special_tokens": special}
        tokenizer["post_processor"] = {"type": "Sequence", "processors": [tokenizer["post_processor"], template]}
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


def add_steps(folder: Path, steps: Sequence[str], **settings: Any) -> None:
    """Writes modules.json of sentence-transformers and the settings of its second step."""
    names = [f"{number}_{step.rpartition('.')[2]}" for number, step in enumerate(steps)]
    modules = [
        {"idx": number, "name": str(number), "path": name if number else "", "type": f"sentence_transformers.{step}"}
        for number, (step, name) in enumerate(zip(steps, names, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (folder / names[1]).mkdir(exist_ok=True)
    (folder / names[1] / "config.json").write_text(json.dumps(settings), encoding="utf-8")


def picture(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


class Recipe:
    """The reference: a checkpoint in transformers, which processes one input at a time without padding."""

    def __init__(self, folder: Path) -> None:
        import torch
        import transformers

        torch.set_num_threads(1)
        self.folder = folder
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
        self.body = transformers.AutoModel.from_pretrained(folder, **options).eval()

    def hidden(self, ids: list[int], images: Any = None) -> np.ndarray:
        """The hidden state of the last token after the final norm."""
        import torch

        tokens = torch.tensor([ids])
        arguments: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if images is not None:
            arguments["pixel_values"] = torch.tensor(images["pixel_values"])
            arguments["image_grid_thw"] = torch.tensor(images["image_grid_thw"])
            arguments["mm_token_type_ids"] = (tokens == IMAGE).int()
        with torch.no_grad():
            return self.body(**arguments).last_hidden_state[0, -1].numpy()

    def rows(self) -> np.ndarray:
        """The rows of the head for yes and no."""
        import torch
        import transformers

        name = "Qwen3VLForConditionalGeneration" if hasattr(self.body, "visual") else "Qwen3ForCausalLM"
        model = getattr(transformers, name).from_pretrained(self.folder, dtype=torch.float32)
        return model.lm_head.weight.detach().numpy()[[YES, NO]]

    def embedding(self, hidden: np.ndarray) -> np.ndarray:
        return hidden / np.linalg.norm(hidden)

    def text(self, text: str) -> np.ndarray:
        """The embedding of a text."""
        return self.embedding(self.hidden(self.tokenizer(text)["input_ids"]))

    def seen(self, system: str, parts: list[dict[str, Any]]) -> np.ndarray:
        """The hidden state after a conversation with images."""
        messages: list[Any] = [
            {"role": "system", "content": [{"type": "text", "text": system}]},
            {"role": "user", "content": parts},
        ]
        text: Any = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        pictures = [part["image"] for part in parts if part["type"] == "image"]
        if not pictures:
            return self.hidden(self.tokenizer(text)["input_ids"])
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        limits = {"shortest_edge": 4 * AREA, "longest_edge": 1800 * AREA}
        processor = Qwen2VLImageProcessorPil.from_pretrained(self.folder, size=limits)
        images = processor(images=pictures, return_tensors="np")
        grids = iter(images["image_grid_thw"])
        text = re.sub(re.escape(PAD), lambda _: PAD * int(next(grids).prod() // 4), text)
        return self.hidden(self.tokenizer(text)["input_ids"], images)
