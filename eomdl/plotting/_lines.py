"""What the pictures share."""

import numpy as np


def positive(values: np.ndarray) -> np.ndarray:
    """The values with NaN where a log axis has no place for them."""
    return np.where(values > 0, values, np.nan)
