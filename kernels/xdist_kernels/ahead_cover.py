"""Which launches of a kernel the table of compiled kernels has to hold, of all that can be made.

A wrapper can start a kernel with more sets of constants than anybody can compile: every head dim,
every mix of options. What a launch is made of:

    kind     the width of the numbers that are multiplied, and how float32 is; the kind of decay
    blocks   sizes that follow from the call's dims
    tile     the other sizes, warps and stages, which follow from kind and blocks
    dims     exact dims of the call, which only mask blocks: whether they fill them, whether 16
             divides them, whether one block holds them
    flags    options, arguments left out, widths of arguments

A launch is covered where, among the compiled ones of its kernel and target,

    - one has each of its blocks with its kind, one each of its blocks with its decay,
    - one has its tile and kind, one the same of each of its dims, one each two of its flags (where
      it multiplies no matrices, one each flag),
    - one of its kind and decay is in no size smaller and has no fewer stages: it bounds the shared
      memory.

Of numbers that a program reads when it runs (lengths, strides, addresses) nothing enters, though
the compiler asks whether 16 divides them and whether they are 1: cases have the divisible ones,
with which it moves the most bytes at once.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any, NamedTuple

from xdist_kernels.launch import Launch

# Exact dims, and the blocks that are filled up with them; one alone is a number of steps.
DIMS = {
    "D": ("BD",), "E": ("BE",), "D1": ("BD1",), "D2": ("BD2",), "K": ("KP", "BK"),
    "V": ("VP", "BV"), "VP": ("BV",), "N": ("BN",),
}  # fmt: skip
BLOCKS = frozenset({"BD", "BE", "BD1", "BD2", "BK", "BV", "BN", "KP", "W"})
# Arguments whose numbers are multiplied as matrices.
OPERANDS = frozenset({"p_q", "p_weight", "p_scores", "p_n", "p_keys", "x", "q", "k"})
_HALVES = ("*fp16", "*bf16")

Fact = tuple[Any, ...]


class Made(NamedTuple):
    """What a launch is made of. sizes: all, in the order of the kernel's parameters."""

    kind: str
    decay: str
    blocks: dict[str, int]
    sizes: tuple[int, ...]
    tile: tuple[int, ...]
    dims: dict[str, str]
    flags: dict[str, str]


def made_of(launch: Launch) -> Made:
    """A launch taken apart."""
    declared = {p.name for p in launch.kernel.params if p.is_constexpr}
    constants = {name: getattr(x, "value", x) for name, x in launch.constants if name in declared}
    integers = {name: x for name, x in constants.items() if type(x) is int and name != "DECAY"}
    sizes = {name: x for name, x in integers.items() if name not in DIMS}
    flags = {name: _width(kind) for name, kind in launch.signature if kind.startswith("*")}
    # The widest: narrower ones are widened as they are read. None where nothing is multiplied.
    operands = sorted({width for name, width in flags.items() if name in OPERANDS})[:1]
    operands = operands if "PRECISION" in constants else []
    # Tensors that are not there; numbers that are 1 became constants too, and say nothing.
    flags |= {name: "none" for name, x in launch.constants if x is None}
    flags |= {name: str(x) for name, x in constants.items() if type(x) in (bool, str)}
    precision = flags.pop("PRECISION", "")
    flags.pop("INVERSE", None)
    decay = str(constants.get("DECAY", ""))
    if decay:
        flags["DECAY"] = decay
    return Made(
        kind=" ".join([*operands, *([precision] if "float" in operands else [])]),
        decay=decay,
        blocks={name: x for name, x in sizes.items() if name in BLOCKS},
        sizes=(*sizes.values(), launch.config.stages),
        tile=(*(x for name, x in sizes.items() if name not in BLOCKS), *launch.config),
        dims={name: _fit(name, integers) for name in integers if name in DIMS},
        flags=flags,
    )


def _width(kind: str) -> str:
    return "half" if kind in _HALVES else "float" if kind.startswith("*fp") else "integer"


def _fit(name: str, integers: dict[str, int]) -> str:
    """How an exact dim lies in its blocks."""
    dim = integers[name]
    block = next((integers[block] for block in DIMS[name] if block in integers), 1)
    if dim % block == 0:
        return "one block" if dim == block else "whole blocks"
    return "partly, 16 divides it" if dim % 16 == 0 else "partly"


class Cover:
    """Compiled launches of one target, and what they cover."""

    def __init__(self) -> None:
        self._facts: set[Fact] = set()
        self._largest: dict[Fact, list[tuple[tuple[int, ...], str]]] = {}

    def add(self, launch: Launch, key: str = "") -> None:
        """Counts a launch as compiled; key: its row in the table."""
        made, kernel = made_of(launch), launch.kernel.__name__
        self._facts |= _facts(kernel, made)
        self._largest.setdefault((kernel, made.kind, made.decay), []).append((made.sizes, key))

    def lacks(self, launch: Launch) -> list[str]:
        """What no compiled launch shows of this one, nothing where it is covered."""
        made, kernel = made_of(launch), launch.kernel.__name__
        found = sorted(" ".join(map(str, fact)) for fact in _facts(kernel, made) - self._facts)
        if not self.bounds(launch):
            found.append(f"{kernel} {made.kind} {made.decay} none as large as {made.sizes}")
        return found

    def bounds(self, launch: Launch) -> list[str]:
        """The rows of its kernel, kind and decay that are in no size smaller."""
        made, kernel = made_of(launch), launch.kernel.__name__
        rows = self._largest.get((kernel, made.kind, made.decay), [])
        return [
            key
            for sizes, key in rows
            if all(own <= other for own, other in zip(made.sizes, sizes, strict=True))
        ]


def _facts(kernel: str, made: Made) -> set[Fact]:
    facts: set[Fact] = {(kernel, "tile", made.kind, made.tile)}
    for name, size in made.blocks.items():
        facts |= {(kernel, name, size, "of", made.kind), (kernel, name, size, "decay", made.decay)}
    facts |= {(kernel, name, fit) for name, fit in made.dims.items()}
    flags = sorted(f"{name}={value}" for name, value in made.flags.items())
    # Without products of matrices nothing but loads and arithmetic hangs on them.
    facts |= {(kernel, *some) for some in combinations(flags, 2 if made.kind else 1)}
    return facts
