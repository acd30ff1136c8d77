"""Present so that pytest puts this folder on the path: `numpy_twin` is imported from tests in folders below."""
