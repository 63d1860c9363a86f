"""Have BLAS compute in one thread, for fits of a few numbers."""

from collections.abc import Generator
from contextlib import contextmanager
from functools import cache

from threadpoolctl import ThreadpoolController


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()


@contextmanager
def one_blas_thread() -> Generator[None]:
    """Within the block, BLAS computes in one thread. L-BFGS over a few numbers calls it hundreds of times, and its
    threads, which wait by spinning, take twenty times the CPU time of what they compute. SciPy must be imported."""
    with _libraries().limit(limits=1, user_api="blas"):
        yield
