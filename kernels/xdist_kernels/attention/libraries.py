"""Which calls other projects' kernels take over on a GPU: cuDNN, flash-attn, torch's flash kernel.

They take a call where they serve its mask exactly (library_masks.py) and its results are not added
up: they round outputs and gradients to the inputs' dtype, and what is added must be float32. So the
caller says `rounded`: it adds nothing to what it gets. A ring never says it.

    cudnn        torch's cuDNN attention: one length for all sequences, causal or bidirectional;
                 Hopper and data-centre Blackwell, head dims to 128, not under
                 torch.use_deterministic_algorithms
    flash_attn   the package flash-attn 2: packed sequences and windows too, soft-cap, head dims to
                 256
    flash_sdpa   torch's own flash kernel: the same without soft-cap. What
                 torch.nn.attention.activate_flash_attention_impl puts in its place is used.

All of them: float16 or bfloat16, head dims in steps of 8, grouped queries; no dropout, no sinks in
forward. The first in this order that serves is taken. Forward and backward choose apart: they share
only the output and the log-sum-exp. Decisions need no GPU; library_calls.py makes the calls.
"""

from __future__ import annotations

import threading
import weakref
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from xdist_kernels import backend, launch
from xdist_kernels.attention import library_calls
from xdist_kernels.attention.blocks import Spans
from xdist_kernels.attention.dropout import Dropped
from xdist_kernels.attention.library_masks import Sequences, find_sequences
from xdist_kernels.errors import KernelError

LIBRARIES = ("cudnn", "flash_attn", "flash_sdpa")
# GPUs of the first kind hold a block of 256-wide heads in flash's backward, others do not.
_WIDE_HEADS = (80, 90, 100, 103)
_CUDNN_GPUS = (90, 100, 103)
# Before this, cuDNN erred at lengths that 128 does not divide (pytorch issue 169849).
_CUDNN_ANY_LENGTH = 91501
_FLASH_ATTN = (2, 8)
_FAR = 2**31


class Here(NamedTuple):
    """What is installed and switched on: versions as numbers, None where there is none."""

    capability: int
    cudnn: int | None
    flash_sdpa: bool
    flash_attn: tuple[int, int] | None
    deterministic: bool


class Shapes(NamedTuple):
    """What a decision needs of the tensors; far: the elements the largest of them spans."""

    dtype: torch.dtype
    batch: int
    queries: int
    keys: int
    heads: int
    groups: int
    dim: int
    width: int
    far: int


class Taken(NamedTuple):
    """A library, the sequences it is given, and why it is taken, or why none is (name None)."""

    name: str | None
    plan: Sequences | None
    why: str


def shapes_of(q: Tensor, k: Tensor, v: Tensor) -> Shapes:
    far = max(sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) for x in (q, k, v))
    batch, queries, heads, dim = q.shape
    keys, groups, width = k.shape[1], k.shape[2], v.shape[3]
    return Shapes(q.dtype, batch, queries, keys, heads, groups, dim, width, far)


def here(device: torch.device) -> Here | None:
    """What there is for tensors on `device`; None where it is no GPU."""
    if device.type != "cuda":
        return None
    cuda = torch.backends.cuda
    cudnn = torch.backends.cudnn.version() if cuda.cudnn_sdp_enabled() else None
    return Here(
        launch.target_of(device).capability,
        cudnn,
        cuda.flash_sdp_enabled() and cuda.is_flash_attention_available(),
        library_calls.flash_attn_version(),
        torch.are_deterministic_algorithms_enabled(),
    )


def refusal(name: str, at: Here, x: Shapes, plan: Sequences, softcap: float | None) -> str | None:
    """Why this library cannot serve a call whose mask is `plan`; None where it can."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, the inputs are {x.dtype}"
    if x.dim % 8 or x.width % 8 or min(x.batch, x.dim, x.width, x.heads) == 0:
        return f"it takes head dims in steps of 8, these are {x.dim} and {x.width}"
    if name == "cudnn":
        return _cudnn_refusal(at, x, plan, softcap)
    if name == "flash_attn" and (at.flash_attn is None or at.flash_attn < _FLASH_ATTN):
        needs = ".".join(map(str, _FLASH_ATTN))
        return f"flash-attn {needs} or newer is not installed"
    if name == "flash_attn" and at.flash_attn is not None and at.flash_attn[0] > 2:
        return "its version is not 2: torch's activate_flash_attention_impl serves newer ones"
    if name == "flash_sdpa" and not at.flash_sdpa:
        return "torch's flash kernel is not in this build, or switched off"
    if name == "flash_sdpa" and softcap is not None:
        return "it knows no soft-cap"
    if at.capability < 80:
        return f"it needs compute capability 8.0, this GPU has {at.capability / 10}"
    if x.dim != x.width:
        return f"its keys and values have one head dim, these are {x.dim} and {x.width}"
    if x.dim > 256 or (x.dim > 192 and at.capability not in _WIDE_HEADS):
        return f"head dim {x.dim} is too wide for it on this GPU"
    if x.batch * max(x.queries, x.keys) >= _FAR:
        return "it counts tokens in 32 bits"
    return None


def _cudnn_refusal(at: Here, x: Shapes, plan: Sequences, softcap: float | None) -> str | None:
    if at.cudnn is None:
        return "cuDNN attention is not in this build of torch, or switched off"
    if at.capability not in _CUDNN_GPUS:
        return f"it is fast from compute capability 9.0 on, this GPU has {at.capability / 10}"
    if at.deterministic:
        return "its backward adds in no fixed order, and deterministic algorithms are asked for"
    if softcap is not None:
        return "it knows no soft-cap"
    if (plan.left, plan.right) not in ((-1, -1), (-1, 0)):
        return "torch gives it no window"
    if not plan.alike:
        return "its sequences have one length"
    if plan.right == 0 and not plan.square:
        return "its causal mask has as many keys as queries"
    queries, keys = plan.longest
    if keys < 2:
        return "it takes two keys or more"
    if at.cudnn < _CUDNN_ANY_LENGTH and (queries % 128 or keys % 128):
        return f"cuDNN {at.cudnn} takes lengths that 128 divides"
    if max(x.dim, x.width) > 128:
        return f"head dims to 128, these are {x.dim} and {x.width}"
    if max(x.batch * plan.count, x.heads) > 65535 or x.far >= _FAR:
        return "there are more rows, heads or elements than it counts"
    return None


def choose(
    at: Here, x: Shapes, plan: Sequences | str, *, softcap: float | None = None,
    form: str | None = None,
) -> Taken:  # fmt: skip
    """The library for a call, or why none serves. A `form` that is forced is the only one asked,
    and serves where it is exact, be it slow there."""
    if isinstance(plan, str):
        return Taken(None, None, plan)
    if form is None and plan.idle is not None:
        return Taken(None, plan, plan.idle)
    refused = []
    for name in LIBRARIES if form is None else (form,):
        why = refusal(name, at, x, plan, softcap)
        if why is None:
            return Taken(name, plan, plan.told)
        refused.append(f"{name}: {why}")
    return Taken(None, plan, "; ".join(refused))


def take(
    q: Tensor, k: Tensor, v: Tensor, *, spans: Spans, k_positions: Tensor,
    softcap: float | None = None, sinks: bool = False, drops: bool = False, rounded: bool = True,
    form: str | None = None, at: Here | None = None,
) -> Taken:  # fmt: skip
    """The library for these tensors; `at` is what is installed, found out where it is None.

    Looks at no values but those of spans and positions, once for each set of them.

    Raises:
        KernelError: `form` names a library, and it cannot serve.
    """
    taken = _take(q, k, v, spans, k_positions, softcap, sinks, drops, rounded, form, at)
    if taken.name is None and form in LIBRARIES:
        raise KernelError(
            f"attention was to be served by {form!r}, which cannot serve this call\n{taken.why}\n"
            "force no form: the call then goes to what serves it"
        )
    return taken


def _take(
    q: Tensor, k: Tensor, v: Tensor, spans: Spans, k_positions: Tensor, softcap: float | None,
    sinks: bool, drops: bool, rounded: bool, form: str | None, at: Here | None,
) -> Taken:  # fmt: skip
    why = None
    if form is not None and form not in LIBRARIES:
        why = f"{form!r} is forced"
    elif not rounded:
        why = "results are added up, and libraries round them"
    else:
        why = no_mask_helps(q, sinks=sinks, drops=drops, at=at)
    if why is not None:
        return Taken(None, None, why)
    at = here(q.device) if at is None else at
    assert at is not None  # else no mask had helped
    plan = sequences_of(spans, k_positions)
    return choose(at, shapes_of(q, k, v), plan, softcap=softcap, form=form)


def no_mask_helps(q: Tensor, *, sinks: bool, drops: bool, at: Here | None = None) -> str | None:
    """Why no library serves, whatever the mask; None: the mask decides, and must be looked at."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"libraries take float16 and bfloat16, the inputs are {q.dtype}"
    if drops:
        return "there is dropout, whose numbers are ours"
    if sinks:
        return "a sink would be merged into rounded outputs"
    if at is None and here(q.device) is None:
        return f"tensors are on {q.device}"
    return None


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, spans: Spans, k_positions: Tensor,
    softcap: float | None = None, sinks: Tensor | None = None, dropout: Dropped | None = None,
    form: str | None = None, at: Here | None = None,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """`torch.attention_forward` by a library, out in q's dtype and lse float32; None: none serves.

    The caller adds nothing to what it gets. What serves is said once on the logger "xdist".
    """
    taken = take(
        q, k, v, spans=spans, k_positions=k_positions, softcap=softcap, sinks=sinks is not None,
        drops=_drops(dropout), form=form, at=at,
    )  # fmt: skip
    if taken.name is None or taken.plan is None:
        return None
    backend.say("attention forward", taken.name, taken.why)
    return library_calls.forward(taken.name, q, k, v, taken.plan, scale=scale, softcap=softcap)


def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, out: Tensor, dout: Tensor, *, scale: float,
    spans: Spans, k_positions: Tensor, softcap: float | None = None,
    dropout: Dropped | None = None, form: str | None = None, at: Here | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:  # fmt: skip
    """dq, dk and dv in q's dtype by a library; None: none serves. `lse` and `out` are those of all
    keys, whatever made them, sinks included."""
    taken = take(
        q, k, v, spans=spans, k_positions=k_positions, softcap=softcap, drops=_drops(dropout),
        form=form, at=at,
    )  # fmt: skip
    if taken.name is None or taken.plan is None:
        return None
    backend.say("attention backward", taken.name, taken.why)
    return library_calls.backward(
        taken.name, q, k, v, lse, out, dout, taken.plan, scale=scale, softcap=softcap
    )


def _drops(dropout: Dropped | None) -> bool:
    return dropout is not None and dropout.rate > 0.0


# Plans by the tensor they were made of, so that the host asks the device about it but once.
_lock = threading.Lock()
_Kept = tuple[tuple["weakref.ref[Tensor]", ...], tuple[int, ...], "Sequences | str"]
_plans: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def sequences_of(spans: Spans, k_positions: Tensor) -> Sequences | str:
    """`find_sequences`, once for the same tensors with the same values.

    spans: four int64 `[n]`, or `[H,n]`, which is refused where heads differ.
    """
    read = (*spans, k_positions)
    if any(x.is_inference() for x in read):
        return _found(spans, k_positions)
    versions = tuple(x._version for x in read)
    with _lock:
        kept: _Kept | None = _plans.get(spans[1])
    if kept is not None:
        same = all(ref() is x for ref, x in zip(kept[0], read, strict=True))
        if same and kept[1] == versions:
            return kept[2]
    plan = _found(spans, k_positions)
    with _lock:
        _plans[spans[1]] = (tuple(weakref.ref(x) for x in read), versions, plan)
    return plan


def _found(spans: Spans, k_positions: Tensor) -> Sequences | str:
    if spans[0].dim() == 1:
        return find_sequences(spans, k_positions)
    lo, hi, prefix_lo, prefix_hi = spans
    if len(lo) == 0 or any(not torch.equal(s, s[:1].expand_as(s)) for s in spans):
        return "heads see different keys"
    return find_sequences((lo[0], hi[0], prefix_lo[0], prefix_hi[0]), k_positions)
