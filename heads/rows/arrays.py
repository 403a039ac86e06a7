"""Any array-like as a NumPy array, with few imports: `heads.kernels` needs torch and NumPy alone."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from featcache.errors import HeadError


def to_numpy(value: object) -> NDArray[Any]:
    """Any array-like as an array; tensors on the CPU are not copied (bfloat16 becomes float32).

    Arrays with negative strides (``X[::-1]``), of the other byte order or of more than 64 bits are copied, since torch
    supports none of them. HeadError for an array with masked entries, whose values mean nothing.
    """
    if np.ma.is_masked(value):
        raise HeadError("got an array with masked entries, expected none; drop their rows, or fill them")
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu()
        value = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    array = np.asarray(value)
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        return array.astype(np.float64)
    if not array.dtype.isnative:  # read from a file of another byte order
        return array.astype(array.dtype.newbyteorder("="))
    return array.copy() if any(stride < 0 for stride in array.strides) else array
