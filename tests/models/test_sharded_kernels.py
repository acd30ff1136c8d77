"""Runs `eight_devices_kernels.py`, in a file of its own, which another process may take."""

from test_sharding import run


def test_eight_devices() -> None:
    run("eight_devices_kernels.py")
