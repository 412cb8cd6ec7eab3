"""Closed form of k SGD steps without a gradient: momentum and weight decay as one 2 x 2 matrix.

With g = 0, learning rate lr, momentum mu and decay d, a step takes a row w and its velocity v to

    v' = mu v + d w,   w' = w - lr v',   or   (w', v') = M (w, v),   M = [[1 - lr d, -lr mu], [d, mu]],

element by element. So steps i + 1 to k, whatever their learning rates, are the single matrix M_k ... M_(i+1).
"""

import torch
from torch import Tensor


class History:
    """Matrices of the steps since the last `clear`, at most `window` of them, multiplied up to the present.

    `count` steps are held. For each i from 0 to `count`, the product of the steps after the i-th is kept, for rows and
    for the bias, which does not decay. So a step costs one product of a 2 x 2 matrix with [2, 2 window] float64
    numbers: some microseconds, and 64 KB for 1024 steps, however long the run.
    """

    def __init__(self, momentum: float, weight_decay: float, device: torch.device, window: int = 1024) -> None:
        self.window, self.count = window, 0
        # M = constant + lr slope, so that a new rate need not be copied to the device.
        constant, slope = [], []
        for decay in (weight_decay, 0.0):
            constant.append([[1.0, 0.0], [decay, momentum]])
            slope.append([[-decay, -momentum], [0.0, 0.0]])
        self._constant = torch.tensor(constant, dtype=torch.float64, device=device)
        self._slope = torch.tensor(slope, dtype=torch.float64, device=device)
        self._identity = torch.eye(2, dtype=torch.float64, device=device)
        # Indices: rows or bias; w' or v'; i; w or v.
        self._products = torch.zeros(2, 2, window + 1, 2, dtype=torch.float64, device=device)
        self.clear()

    def clear(self) -> None:
        """Forget all steps."""
        self.count = 0
        self._products[:, :, 0] = self._identity

    def add(self, lr: float, skip: Tensor) -> None:
        """Add a step with learning rate `lr`; where `skip`, a boolean scalar on the device, is true, its matrix is 1.

        At most `window` steps fit in.
        """
        step = torch.where(skip, self._identity, torch.add(self._constant, self._slope, alpha=lr))
        self._products = torch.bmm(step, self._products.flatten(2)).view_as(self._products)
        self.count += 1
        self._products[:, :, self.count] = self._identity

    def since(self, step: Tensor) -> Tensor:
        """Return the products of the steps after the first `step` [n], for rows and bias: [2, 2, 2, n, 1] float32."""
        return self._products[:, :, step.long()].transpose(2, 3).float()[..., None]
