"""Calibration bins: their number, the bin of a confidence, and the expected calibration error (ECE).

A confidence is the largest probability of a row. Bins have equal width, and each is closed on the right (Guo et al.
2017, "On Calibration of Modern Neural Networks").
"""

import numpy as np
import torch
from numpy.typing import NDArray

CALIBRATION_BINS = 15
"""Number of bins."""


def bins_of(confidences: torch.Tensor, n_bins: int = CALIBRATION_BINS) -> torch.Tensor:
    """Index (int64) of the bin of each confidence, of any shape.

    `heads.kernels.cpu` follows the same rule in compiled code.

    >>> bins_of(torch.tensor([0.2, 0.5, 0.51, 1.0]), n_bins=2).tolist()
    [0, 0, 1, 1]
    """
    return (torch.ceil(confidences.double() * n_bins).long() - 1).clamp_(0, n_bins - 1)


def calibration_errors(hits: NDArray[np.int64], confidences: NDArray[np.float64], rows: int) -> NDArray[np.float64]:
    """ECE of each head (H,), from the hits and the sum of confidences of each bin (H, B), over all rows.

    >>> calibration_errors(np.array([[1, 3]]), np.array([[0.8, 3.8]]), rows=5).round(3).tolist()
    [0.2]
    """
    return np.asarray(np.abs(hits - confidences).sum(axis=1) / rows)
