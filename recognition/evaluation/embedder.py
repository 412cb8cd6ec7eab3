"""What is evaluated: anything that turns face images into embeddings."""

from typing import Protocol

import numpy as np


class Embedder(Protocol):
    """Images in, embeddings out: the training backbone and an exported ONNX file both are one."""

    @property
    def image_size(self) -> int:
        """Height and width of the images, in pixels."""

    @property
    def embedding_size(self) -> int:
        """Length of an embedding, D."""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Embeddings, float32 [n, D], not normalised, of aligned RGB faces, uint8 [n, H, W, 3].

        What the network wants done to the pixels, `(x - 127.5) / 127.5`, is done inside.
        """
