"""The kernels' backend of a call, chosen before anything is sent (xdist_kernels/backend.py)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from xdist.errors import StrategyError
from xdist_kernels import backend
from xdist_kernels.errors import KernelError


def chosen(op: str, asked: str, like: Tensor, refusal: Callable[[], str | None]) -> str:
    """ "triton", "torch" or "reference" for a call on the device of `like`, which was asked to run
    on `asked`.

    refusal: why Triton cannot serve, of what every rank knows: device, dtype and head dims.

    Raises:
        StrategyError: no such backend, or Triton is forced and cannot serve.
    """
    choice = decided(op, asked, like, refusal)
    choice.say()
    return choice.name


def decided(op: str, asked: str, like: Tensor, refusal: Callable[[], str | None]) -> backend.Choice:
    """As `chosen`, for a caller that says the choice where it computes, if ever it does."""
    try:
        return backend.decide(op, asked, like.device, refusal)
    except KernelError as error:
        what, _, rest = str(error).partition("\n")
        why, _, do = rest.partition("\n")
        raise StrategyError(what, why, do) from error


def is_auto(asked: str) -> bool:
    """Whether a call that was asked to run on `asked` leaves the choice to the kernels."""
    return asked == backend.default() == "auto"


def check_own(op: object, asked: str) -> None:
    """For a Recurrence of the user's own, whose methods are what runs.

    Raises:
        StrategyError: a backend was asked for.
    """
    if asked != "auto":
        raise StrategyError(
            f"a recurrence of your own cannot be asked to run on backend {asked!r}",
            f"what {type(op).__name__} computes is what its methods say",
            "leave backend at 'auto'",
        )
