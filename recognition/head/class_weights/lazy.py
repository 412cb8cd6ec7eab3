"""What steps do to rows that take no part in them: momentum and decay of SGD, as one 2 x 2 matrix.

Without a gradient, a step of SGD with rate lr, momentum mu and decay d takes a row w and its momentum v to

    v' = mu v + d w,   w' = w - lr v',   or   (w', v') = M (w, v),   M = [[1 - lr d, -lr mu], [d, mu]],

so any number of steps that a row sat out are one product of such matrices, whatever their rates were.
"""

import torch
from torch import Tensor


class History:
    """Products of the matrices of the last steps, at most `window` of them.

    `count` steps are known. A step costs one product of a 2 x 2 matrix with [2, 2 window] float64 numbers, for rows
    and for the bias, which does not decay: some microseconds and 64 KB for 1024 steps, however long the run.
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
        # [rows or bias, w' or v', after which step, w or v]: of the steps after it, up to now.
        self._products = torch.zeros(2, 2, window + 1, 2, dtype=torch.float64, device=device)
        self.clear()

    def clear(self) -> None:
        """Forget all steps."""
        self.count = 0
        self._products[:, :, 0] = self._identity

    def add(self, lr: float, skip: Tensor) -> None:
        """Note a step; where `skip`, a boolean scalar on the device, is true, it does nothing to anything."""
        step = torch.where(skip, self._identity, torch.add(self._constant, self._slope, alpha=lr))
        self._products = torch.bmm(step, self._products.flatten(2)).view_as(self._products)
        self.count += 1
        self._products[:, :, self.count] = self._identity

    def since(self, step: Tensor) -> Tensor:
        """What happened after the first `step` [n] steps: M of the rows and of the bias, [2, 2, 2, n, 1] float32."""
        return self._products[:, :, step.long()].transpose(2, 3).float()[..., None]
