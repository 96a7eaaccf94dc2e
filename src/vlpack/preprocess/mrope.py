"""M-RoPE positions of a prompt with images, for embedding models and rerankers.

For models that generate, onnxruntime-genai computes these positions itself.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def mrope_positions(
    input_ids: npt.NDArray[np.integer], grids: npt.NDArray[np.int64], image_token_id: int, merge_size: int
) -> npt.NDArray[np.int64]:
    """M-RoPE positions along time, height and width: int64 ``[3, S]``.

    Text tokens advance all three axes. The tokens of an image share one time position; their row and column positions
    count up from it, and the text after the image starts at that position plus the larger of the row and column counts.
    Sources: Qwen2-VL (arXiv:2409.12191); ``Qwen3VLModel.get_rope_index`` in transformers.

    Args:
        input_ids: token ids ``[S]`` with expanded placeholders.
        grids: ``[images, 3]``, patches along time (1), height and width, in the order of the placeholders.
        image_token_id: token id of the image placeholder.
        merge_size: patches along each edge of a token.
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
