"""The page about `auto`, with its table of choices: `python -m xdist.cost.attention_table`.

docs/strategies/auto.md is this text; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from xdist.cost.attention import STRATEGIES
from xdist.cost.attention_choice import FLOPS_PER_BYTE, choose
from xdist.cost.attention_keys import Problem
from xdist.documents import Documents
from xdist.layout import Layout
from xdist.mask import Mask

HEAD = f"""# Auto

`strategy="auto"` takes the strategy that keeps its busiest rank shortest. For every strategy that
can serve the call, and for every rank, it counts

```
score(rank) = FLOPs + {FLOPS_PER_BYTE} x bytes      forward and backward; bytes sent and received
```

and takes the strategy whose highest score is lowest. Ties go to the fewest bytes over all ranks,
then to the order {", ".join(STRATEGIES)}. FLOPs are the products over visible pairs, bytes are
those of the strategies' pages, which the ledger equals. The choice is a pure function of layout,
documents, mask and shapes: every rank makes the same one, on any machine, and nothing is sent for
it. `2d` takes part where both degrees of the mesh are above 1, `halo` where the mask's reach is
finite. On one rank nothing is counted.

{FLOPS_PER_BYTE} FLOPs a byte lies between the machines: about 30 for two processes of one CPU, 700
between cards of one host (600 TFLOP/s, 450 GB/s each way), 6000 over a network of 400 Gb/s. So

- **long, contiguous and causal**: FLOPs decide. Under ring, gather and halo the last rank sees
  nearly twice the mean; ulysses, which shares heads, has none to wait for.
- **long and zigzag or balanced**: all ranks compute the same, and bytes decide: ring for few key
  heads, ulysses for many.
- **narrow windows**: halo, whose bytes do not grow with the sequence.
- **fewer heads than ranks**: ulysses leaves ranks idle; `2d` with an inner degree that divides the
  heads, or ring.

`xdist.parallel.attention.explain(q, k, v, shard, mask=mask)` returns the choice with the busiest
rank of each strategy, and why the others cannot serve; meta tensors will do. The logger
`xdist.cost.attention_choice` says it at level DEBUG. Counting takes milliseconds and is done once a
shard, not once a layer: the layers of a model share it, with the runs of keys that each rank needs
and what each query sees.

`auto` weighs time, not memory: force `ring` where keys and values of the whole sequence do not fit.

## Choices over a grid

D = E = 128, batch 1, bf16; heads are query heads / key heads; the last columns are degrees, ring x
ulysses. Where lengths differ, a cell has the choices at 2,048, 8,192 and 32,768 tokens. Packed rows
are documents of 1,000, 3,000, 200, 6,000 and 600 tokens in turn. This page is written by
`python -m xdist.cost.attention_table > docs/strategies/auto.md`, and a test holds it.

"""


DEGREES = ((2, 1), (2, 2), (2, 4))  # ring, ulysses
HEADS = ((32, 32), (32, 8), (8, 1), (4, 4))
LENGTHS = (2048, 8192, 32768)
MASKS = (
    ("causal", Mask(), False),
    ("bidirectional", Mask(causal=False), False),
    ("causal, window 1,024", Mask(window=1024), False),
    ("causal, packed", Mask(), True),
)
LAYOUTS = ("contiguous", "zigzag", "balanced")
DOCUMENTS = (1000, 3000, 200, 6000, 600)


def documents_of(length: int, *, packed: bool) -> Documents:
    """One document, or packed ones, the last one cut short."""
    cuts = [0]
    while packed and cuts[-1] < length:
        cuts.append(min(length, cuts[-1] + DOCUMENTS[(len(cuts) - 1) % len(DOCUMENTS)]))
    return Documents.of(cuts if packed else None, length)


def layout_of(name: str, documents: Documents, parts: int, mask: Mask) -> Layout:
    """The layout of that name."""
    if name == "balanced":
        return Layout.balanced(documents, parts, mask)
    return (Layout.zigzag if name == "zigzag" else Layout.contiguous)(documents.length, parts)


def problem_of(
    mask: Mask, layout: str, heads: tuple[int, int], degrees: tuple[int, int], length: int, *,
    packed: bool,
) -> Problem:  # fmt: skip
    """The call of one choice."""
    documents = documents_of(length, packed=packed)
    held = layout_of(layout, documents, degrees[0] * degrees[1], mask)
    return Problem(
        held, documents, mask, held, documents, False, 1, *heads, 128, 128, 2, degrees[1]
    )


def rows() -> Iterator[tuple[str, ...]]:
    """Rows of the table: mask, layout and heads, then the choices at each degree."""
    for (title, mask, packed), layout, heads in product(MASKS, LAYOUTS, HEADS):
        if layout == "balanced" and not packed:
            continue
        cells = []
        for degrees in DEGREES:
            calls = (problem_of(mask, layout, heads, degrees, n, packed=packed) for n in LENGTHS)
            chosen = [choose(call).strategy for call in calls]
            cells.append(chosen[0] if len(set(chosen)) == 1 else ", ".join(chosen))
        yield title, layout, f"{heads[0]} / {heads[1]}", *cells


def page() -> str:
    """The whole page as markdown."""
    titles = ["mask", "layout", "heads", *(f"{ring} x {ulysses}" for ring, ulysses in DEGREES)]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows()]
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
