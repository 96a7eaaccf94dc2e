"""Trains a small checkpoint of Qwen3.5's architecture that reads digits in images, and evaluates packages of it.

Usage:
    python benchmarks/train_digits_qwen3_5.py train FOLDER [--minutes 13]
    vlpack build FOLDER -o fp32 -p fp32        (and int8, int4)
    python benchmarks/train_digits_qwen3_5.py read FOLDER fp32 int8 int4 [--images 200]

An image is a grid of cells, one visual token each, with a digit or nothing in each cell. Digits are drawn in Pillow's
default font with random slant, thickness, blur and noise. The answer is the digits, row by row. Training minimizes the
cross-entropy of the answers. In addition, a linear head on the visual tokens, which is discarded afterwards, learns
each cell's digit, so that the vision encoder learns sooner. The images of `read` have another seed and were not seen in
training. `read` prints the number of right answers of transformers and of each package in the stock onnxruntime-genai,
and the number of answers that equal those of transformers.
"""

from __future__ import annotations

import argparse
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Array = npt.NDArray[Any]

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits-qwen3-vl"
CELL, PATCH = 32, 16
"""Side of a cell and of a patch, in pixels."""
QUESTION = "Read the digits."
SHAPES = [(1, 1), (2, 1), (1, 2), (2, 2), (3, 1), (3, 2), (2, 3)]
"""Columns and rows of an image."""
EMPTY = 10
"""Class of a cell without a digit, for the auxiliary head."""
IDS = {"image_token_id": 2060, "video_token_id": 2061, "vision_start_token_id": 2057, "vision_end_token_id": 2058}
END = 2050
"""Id of the token that ends an answer."""
COPIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
          "preprocessor_config.json")  # fmt: skip
"""Files that are copied from the shipped checkpoint."""
TEXT: dict[str, Any] = {
    "vocab_size": 2176,
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "max_position_embeddings": 4096,
    "bos_token_id": 2048,
    "eos_token_id": END,
    "pad_token_id": 2048,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [6, 5, 5],
    },
}
VISION: dict[str, Any] = {
    "depth": 4,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_heads": 4,
    "patch_size": PATCH,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "num_position_embeddings": 64,
    "out_hidden_size": 192,
    "deepstack_visual_indexes": [],
}


def mask_of(digit: int, random: np.random.Generator) -> Array:
    """The mask of a digit, float32 ``[CELL, CELL]`` from 0 to 1, with random place, slant, thickness and blur."""
    size, middle = 4 * CELL, 2 * CELL
    image = Image.new("L", (size, size))
    font = ImageFont.load_default(float(random.uniform(80, 110)))
    stroke = int(random.integers(0, 3))
    ImageDraw.Draw(image).text((middle, middle), str(digit), 255, font, anchor="mm", stroke_width=stroke)
    shear, x, y = random.uniform([-0.2, -12, -12], [0.2, 12, 12])
    image = image.transform(image.size, Image.Transform.AFFINE, (1, shear, x - middle * shear, 0, 1, y))
    image = image.filter(ImageFilter.GaussianBlur(random.uniform(0, 2.5))).resize((CELL, CELL), Image.Resampling.BOX)
    return np.asarray(image, np.float32) / 255


class Digits:
    """A source of images with digits; the same seed gives the same images.

    Args:
        seed: seed of all random choices.
        variants: number of different masks of each digit.
    """

    def __init__(self, seed: int, variants: int) -> None:
        self._random = np.random.default_rng(seed)
        self._masks = np.stack(
            [[mask_of(digit, self._random) for _ in range(variants)] for digit in range(10)]
        )  # [10, variants, CELL, CELL]

    def image(self, columns: int, rows: int) -> tuple[Array, Array]:
        """An image uint8 ``[rows · CELL, columns · CELL, 3]``, and the class of each cell ``[rows, columns]``."""
        random = self._random
        cells = np.where(random.random((rows, columns)) < 0.75, random.integers(0, 10, (rows, columns)), EMPTY)
        if (cells == EMPTY).all():
            cells[random.integers(rows), random.integers(columns)] = random.integers(10)
        ink, ground = random.uniform(0, 255, (2, 3))
        while np.abs(ink - ground).mean() < 70:
            ink, ground = random.uniform(0, 255, (2, 3))
        mask = np.zeros((rows * CELL, columns * CELL, 1))
        for (row, column), digit in np.ndenumerate(cells):
            if digit != EMPTY:
                chosen = self._masks[digit, random.integers(self._masks.shape[1])]
                mask[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL, 0] = chosen
        pixels = ground + mask * (ink - ground) + random.normal(0, random.uniform(0, 12), (*mask.shape[:2], 3))
        return np.clip(pixels, 0, 255).astype(np.uint8), cells


def text_of(cells: Array) -> str:
    """The answer: the digits of each row that has any, row by row."""
    rows = ["".join(str(digit) for digit in row if digit != EMPTY) for row in cells]
    return "\n".join(row for row in rows if row)


def patches_of(images: Array) -> Array:
    """Patches of images, in the order of Qwen-VL's processor.

    Args:
        images: images of one size, uint8 ``[B, H, W, 3]``.

    Returns:
        The patches, fp32 ``[B · patches, 3 · 2 · PATCH · PATCH]``.
    """
    values = images.astype(np.float32) / 127.5 - 1
    batch, height, width, _ = values.shape
    merged = 2 * PATCH
    values = values.reshape(batch, height // merged, 2, PATCH, width // merged, 2, PATCH, 3)
    values = values.transpose(0, 1, 4, 2, 5, 7, 3, 6)  # [B, rows, columns, 2, 2, 3, PATCH, PATCH]
    both = np.repeat(values[..., None, :, :], 2, axis=-3)  # a still image is two equal frames
    return np.ascontiguousarray(both.reshape(-1, 3 * 2 * PATCH * PATCH))


class Batch(NamedTuple):
    """Images of one size with their questions and answers, as arrays.

    Attributes:
        ids: tokens of questions and answers, ``[B, S]``.
        labels: tokens to predict, ``[B, S - length of the question]``; -100 where there are none.
        pixels: patches of all images.
        grid: size of each image in patches, ``[B, 3]``.
        cells: class of every cell of all images.
    """

    ids: Array
    labels: Array
    pixels: Array
    grid: Array
    cells: Array


class Batches:
    """A source of batches.

    Args:
        prompts: builder of the checkpoint's prompts.
        count: number of images in a batch if they have one cell; batches of larger images are smaller.
    """

    def __init__(self, prompts: Any, count: int) -> None:
        self._prompts, self._count = prompts, count
        self._digits, self._random = Digits(1, 300), np.random.default_rng(2)
        self._heads: dict[tuple[int, int], Array] = {}

    def __call__(self, small: bool) -> Batch:
        """Makes the next batch; ``small`` limits images to one or two cells."""
        columns, rows = SHAPES[self._random.integers(3 if small else len(SHAPES))]
        count = max(8, self._count // (1 + columns * rows // 2))
        made = [self._digits.image(columns, rows) for _ in range(count)]
        head = self._head(columns, rows, made[0][0])
        answers = [[*self._prompts.tokenizer.encode(text_of(cells)), END] for _, cells in made]
        labels = np.full((count, max(map(len, answers))), -100)
        for row, answer in enumerate(answers):
            labels[row, : len(answer)] = answer
        answered = np.where(labels < 0, TEXT["pad_token_id"], labels)
        ids = np.concatenate([np.tile(head, (count, 1)), answered], axis=1)
        pixels = patches_of(np.stack([image for image, _ in made]))
        grid = np.array([[1, 2 * rows, 2 * columns]] * count)
        return Batch(ids, labels, pixels, grid, np.stack([cells for _, cells in made]).flatten())

    def _head(self, columns: int, rows: int, image: Array) -> Array:
        """The tokens of the question about an image of this size."""
        if (columns, rows) not in self._heads:
            parts = [{"type": "image"}, {"type": "text", "text": QUESTION}]
            prompt = self._prompts([{"role": "user", "content": parts}], [Image.fromarray(image)])
            # the patches must be arranged as the processor arranges them
            assert np.abs(patches_of(image[None]) - prompt.pixel_values).max() < 1e-5
            self._heads[columns, rows] = prompt.input_ids[0]
        return self._heads[columns, rows]


def train(folder: Path, minutes: float, batch: int, rate: float, threads: int) -> None:
    """Trains for a number of minutes and writes the checkpoint."""
    import torch
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration
    from transformers.models.qwen3_5 import modeling_qwen3_5

    from vlpack.preprocess import PromptBuilder

    # prompts are short: with the usual chunks of 64 tokens, most of the time would go into padding
    modeling_qwen3_5.torch_chunk_gated_delta_rule = partial(
        modeling_qwen3_5.torch_chunk_gated_delta_rule, chunk_size=16
    )
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = Qwen3_5Config(text_config=TEXT, vision_config=VISION, tie_word_embeddings=True, **IDS)
    model = Qwen3_5ForConditionalGeneration(config)
    model.save_pretrained(folder)
    for name in COPIED:
        shutil.copyfile(EXAMPLE / name, folder / name)
    batches = Batches(PromptBuilder.from_folder(folder, image_token_id=IDS["image_token_id"]), batch)
    judge = torch.nn.Linear(TEXT["hidden_size"], EMPTY + 1)
    parameters = [*model.parameters(), *judge.parameters()]
    print(f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} million parameters", flush=True)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.02, betas=(0.9, 0.98))
    features: list[Any] = []
    model.model.visual.merger.register_forward_hook(lambda _, __, output: features.append(output))
    started, step, sums = time.monotonic(), 0, np.zeros(2)
    while (share := (time.monotonic() - started) / (60 * minutes)) < 1:
        made = batches(small=share < 0.25)
        ids, grid = torch.tensor(made.ids), torch.tensor(made.grid)
        kinds = (ids == IDS["image_token_id"]).int()
        places, _ = model.model.get_rope_index(ids, kinds, image_grid_thw=grid)
        features.clear()
        logits = model(
            input_ids=ids,
            pixel_values=torch.tensor(made.pixels),
            image_grid_thw=grid,
            position_ids=places,
            use_cache=False,
            logits_to_keep=made.labels.shape[1] + 1,
        ).logits
        labels = torch.tensor(made.labels)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())
        seen = torch.nn.functional.cross_entropy(judge(features[0]), torch.tensor(made.cells))
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * np.cos(np.pi * share))
        optimizer.zero_grad()
        (loss + seen).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        sums += (loss.item(), seen.item())
        if step % 50 == 0:
            passed = time.monotonic() - started
            answers, cells = sums / 50
            print(f"step {step}, {passed:.0f} s: answers {answers:.3f}, cells {cells:.3f}", flush=True)
            sums[:] = 0
    model.save_pretrained(folder)


def read(folder: Path, packages: list[Path], count: int) -> None:
    """Evaluates transformers and packages on images that were not seen in training, and prints a table."""
    import torch
    from transformers import Qwen3_5ForConditionalGeneration

    from vlpack.runtime.model import Model
    from vlpack.runtime.sampling import Sampling

    digits = Digits(3, 60)
    images = [digits.image(*SHAPES[number % len(SHAPES)]) for number in range(count)]
    right = [text_of(cells) for _, cells in images]
    reference = Qwen3_5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    wanted: list[str] = []
    print("| | answers right | as transformers |\n| --- | --- | --- |")
    for package in packages:
        model = Model(package)
        prompts = [model.prompt(QUESTION, [Image.fromarray(image)]) for image, _ in images]
        for prompt in prompts if not wanted else ():
            arrays = prompt.transformers_arrays(IDS["image_token_id"], IDS["video_token_id"])
            given = {name: torch.tensor(array) for name, array in arrays.items()}
            mask = torch.ones_like(given["input_ids"])
            out = reference.generate(**given, attention_mask=mask, do_sample=False, max_new_tokens=16)
            wanted.append(model.tokenizer.decode(out[0, prompt.input_ids.size :].tolist()))
        if package is packages[0]:
            print(f"| transformers | {sum(map(str.__eq__, wanted, right))} of {count} | |", flush=True)
        said = [model.generate(prompt, max_tokens=16, sampling=Sampling(temperature=0)).text for prompt in prompts]
        same = sum(map(str.__eq__, said, wanted))
        print(f"| {package.name} | {sum(map(str.__eq__, said, right))} of {count} | {same} of {count} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train")
    training.add_argument("folder", type=Path)
    training.add_argument("--minutes", type=float, default=13)
    training.add_argument("--batch", type=int, default=96, help="images of one cell in a batch; fewer of larger ones")
    training.add_argument("--rate", type=float, default=1.5e-3, help="largest learning rate")
    training.add_argument("--threads", type=int, default=1, help="several are slower while other programs run")
    reading = commands.add_parser("read")
    reading.add_argument("folder", type=Path)
    reading.add_argument("packages", type=Path, nargs="+")
    reading.add_argument("--images", type=int, default=200)
    given = parser.parse_args()
    if given.command == "train":
        train(given.folder, given.minutes, given.batch, given.rate, given.threads)
    else:
        read(given.folder, given.packages, given.images)


if __name__ == "__main__":
    main()
