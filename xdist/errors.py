"""The one family of errors. A message says what broke, why (with the numbers) and what to do."""

from __future__ import annotations


class XdistError(Exception):
    """Base of every error xdist raises on purpose.

    `what` is one line, `why` holds the numbers that broke, `do` the remedy; `str()` joins the
    non-empty ones with line breaks. `exit_code` is the process exit status of the command line.
    """

    exit_code = 1

    def __init__(self, what: str, why: str = "", do: str = "") -> None:
        super().__init__(what, why, do)
        self.what = what
        self.why = why
        self.do = do

    def __str__(self) -> str:
        return "\n".join(part for part in (self.what, self.why, self.do) if part)


class ConfigError(XdistError, ValueError):
    """A setting, argument or combination that cannot be honoured."""

    exit_code = 2


class GeometryError(ConfigError):
    """Degrees, world size and batch do not fit together."""


class LayoutError(ConfigError):
    """Segments that do not cover the sequence exactly once."""


class DocumentsError(ConfigError):
    """`cu_seqlens` that do not describe the sequence."""


class MaskError(ConfigError):
    """A mask that contradicts itself or its call."""


class StrategyError(ConfigError):
    """A forced strategy that cannot honour the request."""


class ShapeError(ConfigError):
    """Shapes, dtypes or devices that do not fit together."""


class LaunchError(XdistError):
    """The environment or a launcher is not as needed."""

    exit_code = 3


class PortError(LaunchError):
    """The port on which the ranks were to meet is taken; another one may be tried."""


class CheckpointError(XdistError):
    """A checkpoint that cannot be written, trusted or found."""

    exit_code = 4


class DataError(XdistError):
    """Input data that is missing, damaged or changed."""

    exit_code = 5


class NumericsError(XdistError, ArithmeticError):
    """Values that are not finite, or outside the range an op is defined for."""

    exit_code = 6


class PeerLost(XdistError, RuntimeError):  # noqa: N818 - a public name of the contract
    """Another rank died, hung or left in the middle of a move."""

    exit_code = 7

    def __init__(
        self,
        what: str,
        why: str = "",
        do: str = "",
        *,
        move: str = "",
        rank: int | None = None,
        host: str = "",
    ) -> None:
        super().__init__(what, why, do)
        self.move = move
        self.rank = rank
        self.host = host


class DesyncError(XdistError, RuntimeError):
    """Ranks that must hold the same values or make the same calls do not."""

    exit_code = 8


class OutOfMemoryError(XdistError, MemoryError):
    """A device ran out of memory."""

    exit_code = 9
