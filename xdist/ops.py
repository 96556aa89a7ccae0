"""The public functions, with or without a shard. Thin: each checks nothing twice and delegates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast, overload

from torch import Tensor

from xdist.comm import switch as switch_move
from xdist.comm.collectives import ProcessGroup
from xdist.errors import StrategyError
from xdist.mask import Mask
from xdist.memory import loss as loss_memory
from xdist.memory import mean as mean_memory
from xdist.memory.carry import Carry, whole_sequence
from xdist.parallel import attention as attention_parallel
from xdist.parallel import conv as conv_parallel
from xdist.parallel import delta_rule as delta_rule_parallel
from xdist.parallel import linear_attention as linear_attention_parallel
from xdist.parallel import prefix_attention as prefix_attention_parallel
from xdist.parallel import recurrent
from xdist.parallel import selective_scan as selective_scan_parallel
from xdist.parallel import ssd as ssd_parallel
from xdist.parallel.carried import carried_convolution
from xdist.parallel.recurrence import Recurrence
from xdist.shard import SequenceShard, resolve


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shard: SequenceShard | None = None,
    *,
    mask: Mask,
    strategy: str = "auto",
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_shard: SequenceShard | str = "same",
) -> Tensor:
    """Softmax attention: softmax(softcap(scale * q k^T), mask) v.

    Args:
        q: `[B, n, H, D]`, this rank's queries, any float dtype.
        k: `[B, m, G, D]`, the dtype of q. H is a multiple of G: each key head serves H / G query
            heads.
        v: `[B, m, G, E]`, the dtype of q; E may differ from D.
        shard: where this rank's queries lie; None is one device.
        mask: which keys a query sees, inside its own document.
        strategy: "ulysses", "ring", "gather" or "halo" (masks of finite reach on both sides);
            "auto" takes the one whose busiest rank moves the fewest bytes, forward and backward
            together (`xdist.parallel.attention.explain` says which and why).
        scale: None is `D ** -0.5`.
        softcap: c > 0 turns a score s into `c * tanh(s / c)`, before the mask.
        sinks: `[H]`, one extra logit per head that takes probability and adds no value; its
            gradient is this rank's part.
        key_shard: "same" (keys lie as the queries), "replicated" (every rank holds all keys; their
            gradient is this rank's part) or the keys' own SequenceShard, whose document i the
            queries' document i sees. Causal and window masks need "same".

    Returns:
        `[B, n, H, E]` in the dtype of q; a query that sees nothing gets 0. Scores and sums are
        float32 inside, float64 for float64.

    What moves, how many bytes and what is saved: docs/strategies/ulysses.md, ring.md, gather.md
    and halo.md. Shares may be uneven or empty, H and G need not divide by the ranks.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit together or with the shard.
        MaskError: a window list of another length, or a mask that keys elsewhere cannot serve.
        StrategyError: an unknown strategy, or halo with a mask of unlimited reach.
        NumericsError: inside `xdist.checks()`, inputs that are not finite.

    Source: blockwise as Dao, "FlashAttention-2" (2023), algorithms 1 and 2; ring as Liu et al.,
    "Ring Attention with Blockwise Transformers" (2023); ulysses as Jacobs et al., "DeepSpeed
    Ulysses" (2023).
    """
    whole_sequence("attention", shard)
    return attention_parallel.attention(
        q,
        k,
        v,
        shard,
        mask=mask,
        strategy=strategy,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        key_shard=key_shard,
    )


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shard: SequenceShard | None = None,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    strategy: str = "auto",
    algorithm: str = "auto",
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Gated linear attention.

    S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T, o_t = scale * S_t^T q_t.

    Args:
        q: `[B, n, Hk, K]`, this rank's tokens; float64, float32 or bfloat16.
        k: `[B, n, Hk, K]`, the dtype of q.
        v: `[B, n, H, V]`, the dtype of q. H is a multiple of Hk: each key head serves H / Hk
            value heads.
        shard: where this rank's tokens lie; None is one device.
        log_decay: finite and at most 0; None (no decay), `[H]`, `[B, n, H]` or `[B, n, H, K]`.
        scale: None is `K ** -0.5`.
        initial_state: `[B, H, K, V]`, or `[B, documents, H, K, V]` where the shard has documents;
            equal on all ranks. Its gradient is this rank's part, as is that of a `[H]` decay.
        output_final_state: also return the state after the last token (of each document), valid
            on all ranks, float32 (float64 with float64 inputs).
        strategy: "scan" moves states (bytes independent of the sequence), "switch" moves tokens,
            "auto" takes the one with fewer bytes.
        algorithm: of the scan: "gather", "chain", "pipelined" or "auto" (docs/moves/scan.md).
        reverse: from each document's last token to its first; the final state is then the one
            after its first token.

    Returns:
        out `[B, n, H, V]` in the dtype of v, or `(out, final_state)`. Each document starts afresh.

    What moves, how many bytes and what is saved: docs/strategies/scan.md and switch.md. Nothing
    needs to divide anything.

    Raises:
        ShapeError: shapes or dtypes that do not fit together or with the shard.
        StrategyError: an unknown strategy.
        NumericsError: inside `xdist.checks()`, inputs that are not finite or decays above 0.

    Source: Katharopoulos et al., "Transformers are RNNs" (2020); gated and chunked as Yang et al.,
    "Gated Linear Attention Transformers with Hardware-Efficient Training" (2023), eqs. 3 to 6.
    """
    shard = resolve(shard, v.shape[1])
    request = linear_attention_parallel.request(
        q,
        k,
        v,
        shard,
        log_decay=log_decay,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        reverse=reverse,
    )
    return recurrent.run(request, shard, strategy=strategy, algorithm=algorithm)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    shard: SequenceShard | None = None,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    strategy: str = "auto",
    algorithm: str = "auto",
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The delta rule: DeltaNet, Gated DeltaNet (a decay a head), KDA (a decay a key dim).

    S_t = (I - beta_t k_t k_t^T) diag(exp(log_decay_t)) S_{t-1} + beta_t k_t v_t^T,
    o_t = scale * S_t^T q_t.

    Args:
        q: `[B, n, Hk, K]`, this rank's tokens; float64, float32 or bfloat16.
        k: `[B, n, Hk, K]`, the dtype of q, as given: nothing is normalised here.
        v: `[B, n, H, V]`, the dtype of q. H is a multiple of Hk: each key head serves H / Hk
            value heads.
        beta: `[B, n, H]`, any float dtype, between 0 and 2 for keys of length 1.
        shard: where this rank's tokens lie; None is one device.
        log_decay: finite and at most 0; None (no decay), `[H]`, `[B, n, H]` or `[B, n, H, K]`.
        scale: None is `K ** -0.5`.
        initial_state: `[B, H, K, V]`, or `[B, documents, H, K, V]` where the shard has documents;
            equal on all ranks. Its gradient is this rank's part, as is that of a `[H]` decay.
        output_final_state, strategy, reverse: as in `linear_attention`.
        algorithm: of the scan: "chain" and "pipelined" send `[B, H, K, V]` a hop and never a
            transition; "gather" sends `[B, H, K, K]` beside it; "auto" takes what costs least.

    Returns:
        out `[B, n, H, V]` in the dtype of v, or `(out, final_state)`. Each document starts afresh.
        All products run in float32, or in float64 with float64 inputs.

    What moves, how many bytes and what is saved: docs/strategies/scan.md and switch.md; backward
    sends no transition. Nothing needs to divide anything.

    Raises:
        ShapeError: shapes or dtypes that do not fit together or with the shard.
        StrategyError: an unknown strategy.
        NumericsError: inside `xdist.checks()`, inputs that are not finite, decays above 0, or beta
            outside [0, 2].

    Source: Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence
    Length" (2024), section 3; "Gated Delta Networks" (2024), eq. 10; Kimi Team, "Kimi Linear"
    (2025), eq. 1.
    """
    shard = resolve(shard, v.shape[1])
    request = delta_rule_parallel.request(
        q,
        k,
        v,
        beta,
        shard,
        log_decay=log_decay,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        reverse=reverse,
    )
    return recurrent.run(request, shard, strategy=strategy, algorithm=algorithm)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    shard: SequenceShard | None = None,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    strategy: str = "auto",
    algorithm: str = "auto",
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective scan of Mamba-1: a decay of its own for every channel and state.

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t, y_t = (<C_t, h_t> + D u_t) * silu(z_t).

    Args:
        u: `[B, n, C]`, this rank's tokens; float64, float32 or bfloat16.
        delta: `[B, n, C]`, at least 0 after bias and softplus; float64 where u is.
        A: `[C, N]`, at most 0. Its gradient, like those of D, delta_bias and initial_state, is
            this rank's part.
        B: `[B, n, N]`.
        C: `[B, n, N]`.
        shard: where this rank's tokens lie; None is one device.
        D: `[C]` or None.
        z: `[B, n, C]` or None, the gate.
        delta_bias: `[C]` or None, added to delta, in float32 or wider.
        delta_softplus: delta is softplus(delta + bias), in float32 or wider.
        initial_state: `[B, C, N]`, or `[B, documents, C, N]` where the shard has documents; equal
            on all ranks.
        output_final_state: also return the state after the last token (of each document), valid
            on all ranks, float32 (float64 with float64 inputs).
        strategy, algorithm, reverse: as in `linear_attention`. Under "switch" channels are split
            as `torch.tensor_split`; B and C go once to every rank that has channels.

    Returns:
        y `[B, n, C]` in the dtype of u, or `(y, final_state)`. Each document starts afresh.

    What moves, how many bytes and what is saved: docs/recurrences/selective_scan.md. Nothing needs
    to divide anything.

    Raises:
        ShapeError: shapes or dtypes that do not fit together or with the shard.
        StrategyError: an unknown strategy or algorithm.
        NumericsError: inside `xdist.checks()`, inputs that are not finite, delta below 0 or A above
            0.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023),
    algorithm 2.
    """
    shard = resolve(shard, u.shape[1])
    request = selective_scan_parallel.request(
        u,
        delta,
        A,
        B,
        C,
        shard,
        local=selective_scan_parallel.Local(D, z, delta_bias, delta_softplus),
        initial_state=initial_state,
        output_final_state=output_final_state,
        reverse=reverse,
    )
    return recurrent.run(request, shard, strategy=strategy, algorithm=algorithm)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    shard: SequenceShard | None = None,
    *,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    strategy: str = "auto",
    algorithm: str = "auto",
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """State-space duality, the recurrence of Mamba-2: one decay a token and head.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T, y_t = C_t^T h_t + D x_t.

    Args:
        x: `[B, n, H, D]`, this rank's tokens; float64, float32 or bfloat16.
        dt: `[B, n, H]`, above 0, any float dtype: dt x A is float32 or wider.
        A: `[H]`, below 0. Its gradient, like those of D and initial_state, is this rank's part.
        B: `[B, n, G, N]`, the dtype of x. H is a multiple of G: each group serves H / G heads.
        C: `[B, n, G, N]`, the dtype of x.
        shard: where this rank's tokens lie; None is one device.
        D: `[H]` or None, the skip.
        initial_state: `[B, H, N, D]`, or `[B, documents, H, N, D]` where the shard has documents;
            equal on all ranks.
        output_final_state: also return the state after the last token (of each document), valid
            on all ranks, float32 (float64 with float64 inputs).
        strategy, algorithm, reverse: as in `linear_attention`. Under "switch" a group goes once to
            every rank whose heads it serves.

    Returns:
        y `[B, n, H, D]` in the dtype of x, or `(y, final_state)`. Each document starts afresh.

    What moves, how many bytes and what is saved: docs/strategies/scan.md and switch.md: this is
    linear attention with q = C, k = B, v = dt x, log_decay = dt A and scale 1. Nothing needs to
    divide anything.

    Raises:
        ShapeError: shapes or dtypes that do not fit together or with the shard.
        StrategyError: an unknown strategy or algorithm.
        NumericsError: inside `xdist.checks()`, inputs that are not finite, dt not above 0 or A
            above 0.

    Source: Dao and Gu, "Transformers are SSMs" (2024), section 6.
    """
    shard = resolve(shard, x.shape[1])
    request = ssd_parallel.request(
        x,
        dt,
        A,
        B,
        C,
        shard,
        D=D,
        initial_state=initial_state,
        output_final_state=output_final_state,
        reverse=reverse,
    )
    return recurrent.run(request, shard, strategy=strategy, algorithm=algorithm)


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shard: SequenceShard | None = None,
    *,
    scale: float | None = None,
    strategy: str = "auto",
    algorithm: str = "auto",
    reverse: bool = False,
) -> Tensor:
    """Softmax attention of one fixed query per head over every prefix.

    o_t = softmax_{i<=t}(scale * q . k_i) v_i.

    Args:
        q: `[H, D]`, held whole by every rank; its gradient is this rank's part.
        k: `[B, n, H, D]`, this rank's tokens; float64, float32 or bfloat16.
        v: `[B, n, H, V]`.
        shard: where this rank's tokens lie; None is one device.
        scale: None is `D ** -0.5`.
        strategy, algorithm, reverse: as in `linear_attention`; in reverse o_t reads i >= t.

    Returns:
        `[B, n, H, V]` in the dtype of v. Each document starts afresh. Scores and sums are float32
        inside, float64 with float64 inputs; no score is too large.

    What moves, how many bytes and what is saved: docs/recurrences/prefix_attention.md. Nothing
    needs to divide anything.

    Raises:
        ShapeError: shapes or dtypes that do not fit together or with the shard.
        StrategyError: an unknown strategy or algorithm.
        NumericsError: inside `xdist.checks()`, inputs that are not finite.

    Source: Feng et al., "Attention as an RNN" (2024), section 3.
    """
    shard = resolve(shard, v.shape[1])
    request = prefix_attention_parallel.request(q, k, v, shard, scale=scale, reverse=reverse)
    out = recurrent.run(request, shard, strategy=strategy, algorithm=algorithm)
    assert isinstance(out, Tensor)
    return out


def recurrence(
    op: Recurrence,
    *inputs: Tensor | None,
    shard: SequenceShard | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    strategy: str = "auto",
    algorithm: str = "auto",
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """A recurrence of your own over a sharded sequence: docs/add_a_recurrence.md.

    Args:
        op: what one tile of tokens does, a subclass of `xdist.Recurrence`.
        inputs: as `op` wants them: `[B, n, heads, ...]`, this rank's tokens, or None; those whose
            index is in `op.whole` are the same on every rank, and get this rank's part of their
            gradient.
        shard: where this rank's tokens lie; None is one device.
        initial_state: `[B, H, K, V]`, or `[B, documents, H, K, V]` where the shard has documents;
            equal on all ranks.
        output_final_state, strategy, algorithm, reverse: as in `xdist.linear_attention`.

    Returns:
        out `[B, n, H, V]`, or `(out, final_state)`. Each document starts afresh.

    Raises:
        ShapeError: inputs of another length than the shard's, or a state of another shape.
        StrategyError: an unknown strategy or algorithm.
    """
    length = next(x.shape[1] for i, x in enumerate(inputs) if x is not None and i not in op.whole)
    request = recurrent.Request(
        type(op).__name__, op, inputs, initial_state, output_final_state, reverse
    )
    return recurrent.run(request, resolve(shard, length), strategy=strategy, algorithm=algorithm)


def bidirectional(
    op: Callable[..., Any] | Recurrence,
    forward: Mapping[str, Any] | Sequence[Tensor | None],
    backward: Mapping[str, Any] | Sequence[Tensor | None] | None = None,
    shard: SequenceShard | None = None,
    *,
    strategy: str = "auto",
    algorithm: str = "auto",
) -> tuple[Any, Any]:
    """A recurrence from both ends of the sequence, with ONE exchange for the two directions.

    Args:
        op: `xdist.linear_attention`, `delta_rule`, `ssd`, `selective_scan` or `prefix_attention`,
            or a `xdist.Recurrence` of your own.
        forward: the arguments of the direction of positions by name (for a Recurrence: its inputs
            in order), in the order of this rank's tokens.
        backward: those of the other direction, also in the order of this rank's tokens: other
            gates, another A; None takes the same as forward.
        shard, strategy, algorithm: as in `xdist.linear_attention`.

    Returns:
        (out of the forward direction, out of the backward direction), each as `op` returns it, in
        the order of this rank's tokens. The current token counts in both.

    Moves what the two calls move; each pair of ranks exchanges one message where two calls would
    exchange two.

    Raises:
        StrategyError: `op` has no directions, an unknown strategy or algorithm.
        ShapeError: as `op`.

    Source: scans in both directions as in Zhu et al., "Vision Mamba" (2024), section 3.3.
    """
    given = forward if backward is None else backward
    sides = ((forward, False), (given, True))
    if isinstance(op, Recurrence):
        token = next(
            x
            for i, x in enumerate(cast("Sequence[Tensor | None]", forward))
            if x is not None and i not in op.whole
        )
        shard = resolve(shard, token.shape[1])
        requests = [
            recurrent.Request(type(op).__name__, op, tuple(cast("Any", own)), reverse=reverse)
            for own, reverse in sides
        ]
    else:
        build, tokens_of = _directed(op)
        shard = resolve(shard, cast("Any", forward)[tokens_of].shape[1])
        requests = [
            build(**cast("Any", own), shard=shard, reverse=reverse) for own, reverse in sides
        ]
    first, second = recurrent.run_together(requests, shard, strategy=strategy, algorithm=algorithm)
    return first, second


def _directed(op: Callable[..., Any]) -> tuple[Callable[..., recurrent.Request], str]:
    """How the request of a public recurrence is made, and which argument holds its tokens."""
    known: dict[Callable[..., Any], tuple[Callable[..., recurrent.Request], str]] = {
        linear_attention: (linear_attention_parallel.request, "v"),
        ssd: (ssd_parallel.request, "x"),
    }
    if op not in known:
        raise StrategyError(
            "bidirectional() needs a recurrence",
            f"it was given {getattr(op, '__name__', op)!r}",
            f"use one of {', '.join(function.__name__ for function in known)}",
        )
    return known[op]


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    shard: SequenceShard | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    output_final_state: Literal[False] = False,
    reverse: bool = False,
) -> Tensor: ...


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    shard: SequenceShard | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    output_final_state: Literal[True],
    reverse: bool = False,
) -> tuple[Tensor, Tensor]: ...


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    shard: SequenceShard | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal depthwise convolution: y_t = activation(bias + sum_w weight[:, w] x_{t-W+1+w}).

    Args:
        x: `[B, n, C]`, this rank's tokens.
        weight: `[C, W]`; its gradient, like that of bias, is this rank's part.
        bias: `[C]` or None.
        shard: where this rank's tokens lie; None is one device.
        activation: None or "silu".
        initial_state: `[B, W - 1, C]`, the tokens before the first one in position order, or
            `[B, documents, W - 1, C]` where the shard has documents; equal on all ranks. Its
            gradient is this rank's part. None is zeros.
        output_final_state: also return the last W - 1 tokens (of each document), behind the end of
            the initial state where there are fewer; valid on all ranks, in the dtype of x.
        reverse: token t reads t, ..., t + W - 1 of its document, weight[:, W - 1] being its own;
            the state's tokens then lie behind the last one, and the final state is the first W - 1.

    Returns:
        `[B, n, C]` in the dtype of x, or `(out, final_state)`. Each document starts afresh.

    Moves a halo: each segment receives the W - 1 tokens before it in position order, from as many
    ranks as hold them; backward sends their gradients back, in float32 or wider. A final state
    moves each document's last W - 1 tokens once to every rank. Saved for backward: x and the halo.
    Nothing needs to divide anything.

    Raises:
        ShapeError: shapes that do not fit together or with the shard, or another activation.
    """
    if isinstance(shard, Carry):
        plain = initial_state is None and not output_final_state and not reverse
        return carried_convolution(x, weight, bias, shard, activation=activation, plain=plain)
    return conv_parallel.causal_conv1d(
        x,
        weight,
        bias,
        resolve(shard, x.shape[1]),
        activation=activation,
        initial_state=initial_state,
        output_final_state=output_final_state,
        reverse=reverse,
    )


def cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    shard: SequenceShard | None = None,
    *,
    ignore_index: int = -100,
    valid_tokens: int | None = None,
) -> Tensor:
    """Mean cross entropy of `hidden @ head_weight^T` over all valid tokens, tiled over tokens.

    Args:
        hidden: `[B, n, C]`, this rank's tokens, any float dtype.
        head_weight: `[vocab, C]`, the dtype of hidden; its gradient is this rank's part.
        labels: `[B, n]` int64, already shifted by global position; in [0, vocab) or ignore_index.
        shard: where the tokens lie; None is one device.
        ignore_index: labels of this value count nothing.
        valid_tokens: valid labels of the whole global batch (gradient accumulation: of all its
            calls); None counts this call's over data x sequence.

    Returns:
        The global mean, 0-dim, the same on every rank; float32, float64 for float64. Its backward
        is that of this rank's own terms, so that each token counts once in the sum over ranks.
        Without any valid token the loss and its gradients are 0.

    Moves one or two numbers (reduce); backward moves nothing. The logits of one tile exist at a
    time; gradients are made in the same sweep, so that hidden is kept for backward as its own
    gradient, `[B, n, C]`. Backward runs once. Nothing needs to divide anything.

    Raises:
        ShapeError: shapes or dtypes that do not fit together or with the shard.

    Source: fused head and loss as Wijmans et al., "Cut Your Losses in Large-Vocabulary Language
    Models" (2024), section 3, over tiles of tokens rather than of the vocabulary.
    """
    return loss_memory.cross_entropy(
        hidden, head_weight, labels, shard, ignore_index=ignore_index, valid_tokens=valid_tokens
    )


def mean(x: Tensor, shard: SequenceShard | None = None, *, weight: Tensor | None = None) -> Tensor:
    """Global mean of x over data x sequence ranks: `sum(weight * x) / sum(weight)`.

    Args:
        x: any shape, this rank's values (per-token losses, squared errors, residuals).
        shard: where they lie; None is one device.
        weight: broadcasts to x, constant (it gets no gradient); None is 1. Values of weight 0 are
            left out, whatever they are.

    Returns:
        The mean, 0-dim, the same on every rank; float32, float64 for float64; 0 where all weights
        are 0. Its backward is that of this rank's own terms. Sums run in float64.

    Moves two numbers (reduce); backward moves nothing.

    Raises:
        ShapeError: a weight that does not broadcast to x.
    """
    return mean_memory.mean(x, shard, weight=weight)


def switch(
    x: Tensor,
    group: ProcessGroup | None,
    *,
    from_dim: int,
    to_dim: int,
    from_size: int | None = None,
) -> Tensor:
    """The sharded `from_dim` becomes whole and the whole `to_dim` becomes sharded. Differentiable.

    Before: each rank of `group` holds its share of `from_dim`. After: all of it, and its share of
    `to_dim`; shares are those of `torch.tensor_split`. `from_size` is the whole size of
    `from_dim`; it may be left out when every rank holds the same. `group=None` is one rank, the
    identity. Moves (P-1)/P of x each way, backward the same; nothing is saved; nothing must divide
    anything. The dtype is kept. Source: the all-to-all of DeepSpeed-Ulysses (arXiv 2309.14509) and
    DSP (arXiv 2403.10266).

    Raises:
        ShapeError: the dims are equal or not in x, or x does not hold its share of `from_size`.
    """
    return switch_move(x, group, from_dim=from_dim, to_dim=to_dim, from_size=from_size)
