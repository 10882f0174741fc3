"""What the tests of figures share."""

import matplotlib.pyplot as plt
import pytest


@pytest.fixture
def ax():
    """One axes; what it draws is drawn behind the test."""
    plt.switch_backend("agg")
    figure, ax = plt.subplots()
    yield ax
    figure.canvas.draw()  # mathtext and layout errors appear here and not before
    plt.close(figure)
