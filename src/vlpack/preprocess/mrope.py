"""Positions of a prompt with images. The runtime computes them itself when it generates; encoders are given them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def mrope_positions(
    input_ids: npt.NDArray[np.integer], grids: npt.NDArray[np.int64], image_token_id: int, merge_size: int
) -> npt.NDArray[np.int64]:
    """M-RoPE's positions along time, height and width, int64 ``[3, S]``.

    Text counts on all three axes. An image's tokens stay at one time and count rows and columns from there, and what
    follows begins after the larger of both. Source: Qwen2-VL (arXiv:2409.12191); transformers'
    ``Qwen3VLModel.get_rope_index``.

    Args:
        input_ids: ``[S]``, placeholders expanded.
        grids: ``[images, 3]``, patches along time (1), height and width, in the order of the placeholders.
        image_token_id: of the placeholders.
        merge_size: patches along each side of a token.
    """
    positions = np.empty((3, len(input_ids)), np.int64)
    is_image = input_ids == image_token_id
    place = start = 0
    for _, height, width in grids:
        rows, columns = int(height) // merge_size, int(width) // merge_size
        text = int(np.argmax(is_image[place:]))  # tokens before the next placeholder
        positions[:, place : place + text] = start + np.arange(text)
        place, start = place + text, start + text
        image = positions[:, place : place + rows * columns].reshape(3, rows, columns)
        image[0] = start
        image[1] = start + np.arange(rows)[:, None]
        image[2] = start + np.arange(columns)
        positions[:, place : place + rows * columns] = image.reshape(3, -1)
        place, start = place + rows * columns, start + max(rows, columns)
    positions[:, place:] = start + np.arange(len(input_ids) - place)
    return positions
