"""Interface of the models that are evaluated."""

from typing import Protocol

import numpy as np


class Embedder(Protocol):
    """A model that maps face images to embeddings, such as a training backbone or an exported ONNX file."""

    @property
    def image_size(self) -> int:
        """Height and width of the images, in pixels."""

    @property
    def embedding_size(self) -> int:
        """Length of an embedding, D."""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Embed aligned RGB faces, uint8 [n, H, W, 3], as float32 [n, D], not normalised.

        The embedder itself scales the levels as its network expects, usually to `(x - 127.5) / 127.5`.
        """
