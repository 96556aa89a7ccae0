"""The one error of the kernels' room."""


class KernelError(ValueError):
    """Arguments a kernel cannot honour, or a forced backend that is not there."""
