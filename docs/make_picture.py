"""Draws docs/demo.png: shipped images, questions, and what a package built from the shipped checkpoint answers.

Usage: python docs/make_picture.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import vlpack
from vlpack.demo import QUESTIONS, examples_folder

NAMES = ("03.png", "01.png", "07.png", "09.png")
TILE, HEIGHT, LINE, MARGIN = 210, 120, 26, 20


def main() -> None:
    examples = examples_folder()
    with tempfile.TemporaryDirectory() as folder:
        result = vlpack.build(examples / "digits-qwen3-vl", Path(folder) / "digits", precision="int8")
        model = vlpack.load(result.folder)
        greedy = vlpack.Sampling(temperature=0)
        answers = {
            name: [
                (q, model.generate(q, [examples / "digits-images" / name], sampling=greedy).text)
                for q in QUESTIONS.values()
            ]
            for name in NAMES
        }
    size = (MARGIN + len(NAMES) * (TILE + MARGIN), MARGIN * 3 + HEIGHT + LINE * 5 + 8)
    picture = Image.new("RGB", size, "#1e1e2e")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(16)
    draw.text((MARGIN, MARGIN), '$ vlpack run digits --image IMAGE "QUESTION"', fill="#a6e3a1", font=font)
    for column, (name, rows) in enumerate(answers.items()):
        left, top = MARGIN + column * (TILE + MARGIN), MARGIN * 2 + LINE
        image = Image.open(examples / "digits-images" / name).convert("RGB")
        image.thumbnail((TILE, HEIGHT), Image.Resampling.BICUBIC)
        picture.paste(image, (left, top + (HEIGHT - image.height) // 2))
        for row, (question, answer) in enumerate(rows):
            y = top + HEIGHT + 8 + row * 2 * LINE
            draw.text((left, y), question, fill="#9399b2", font=font)
            draw.text((left, y + LINE), " / ".join(answer.split("\n")), fill="#cdd6f4", font=font)
    picture.save(Path(__file__).with_name("demo.png"), optimize=True)


if __name__ == "__main__":
    main()
