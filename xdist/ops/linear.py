"""Linear attention and the delta rule, with or without a shard."""

from __future__ import annotations

from torch import Tensor

from xdist.ops.graph_break import graph_break
from xdist.parallel import delta_rule as delta_rule_parallel
from xdist.parallel import linear_attention as linear_attention_parallel
from xdist.parallel import recurrent
from xdist.shard import SequenceShard, resolve


@graph_break
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
    backend: str = "auto",
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
        backend: "triton", "torch" or "reference" (float64, slow); "auto" takes Triton on CUDA where
            it can serve, else torch (docs/kernels/backends.md).

    Returns:
        out `[B, n, H, V]` in the dtype of v, or `(out, final_state)`. Each document starts afresh.

    What moves, how many bytes and what is saved: docs/strategies/scan.md and switch.md. Nothing
    needs to divide anything.

    Raises:
        ShapeError: shapes or dtypes that do not fit together or with the shard.
        StrategyError: an unknown strategy or backend, or a forced backend that cannot serve.
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
        backend=backend,
    )
    return recurrent.run(request, shard, strategy=strategy, algorithm=algorithm)


@graph_break
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
    backend: str = "auto",
    precision: str = "ieee",
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
        output_final_state, strategy, reverse, backend: as in `linear_attention`.
        algorithm: of the scan: "chain" and "pipelined" send `[B, H, K, V]` a hop and never a
            transition; "gather" sends `[B, H, K, K]` beside it; "auto" takes what costs least.
        precision: of products of float32, transitions and summaries of segments among them:
            "ieee" in full, or on Triton kernels "tf32x3", three products of TF32 parts on tensor
            cores, about 2^-21.

    Returns:
        out `[B, n, H, V]` in the dtype of v, or `(out, final_state)`. Each document starts afresh.
        All products run in float32, or in float64 with float64 inputs; on Triton kernels those of
        outputs and gradients take operands in the dtype of q, k and v.

    What moves, how many bytes and what is saved: docs/recurrences/delta.md; backward sends no
    transition. Nothing needs to divide anything.

    Raises:
        ShapeError: shapes or dtypes that do not fit together or with the shard.
        StrategyError: an unknown strategy, backend or precision, or one that cannot serve.
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
        backend=backend,
        precision=precision,
    )
    return recurrent.run(request, shard, strategy=strategy, algorithm=algorithm)
