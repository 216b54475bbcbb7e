"""One picture resized to any height and width by the filter of `resize`, for what is prepared ahead of training."""

import numpy as np

from pipelines.kernels.resize import scale


def resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """An image of another size: antialiased, rounded, aligned by the centres of its pixels.

    Args:
        pixels: (H, W, 3) or (H, W, 4) uint8; a fourth channel means nothing.

    Returns:
        (height, width, 3) or (height, width, 4) uint8, as given; the fourth channel means nothing.
    """
    source = np.ascontiguousarray(pixels)
    tall, wide, channels = source.shape
    result = np.empty(height * width * channels + 1, np.uint8)
    scale(source.reshape(-1), tall, wide, channels * wide, channels, height, width, False, result)
    return result[:-1].reshape(height, width, channels)
