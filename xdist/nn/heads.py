"""How many heads a mixer has, with errors that hold the numbers."""

from __future__ import annotations

from torch import Tensor

from xdist.errors import ConfigError


def heads_of(mixer: str, width: int, head_dim: int, heads: int | None = None) -> int:
    """`heads` where it is given, else `width / head_dim`.

    Raises:
        ConfigError: head_dim does not divide the width, or sizes below 1.
    """
    if heads is not None:
        if heads < 1 or head_dim < 1:
            raise ConfigError(
                f"mixer {mixer!r}: sizes below 1", f"heads is {heads}, head_dim {head_dim}"
            )
        return heads
    if head_dim < 1 or width < 1 or width % head_dim:
        whole = max(head_dim, 1)
        raise ConfigError(
            f"mixer {mixer!r}: heads do not fill the width",
            f"dim {width} = {width // whole} x head_dim {head_dim} + {width % whole}",
            "choose a head_dim that divides dim, or say how many heads",
        )
    return width // head_dim


def shared_heads(mixer: str, heads: int, key_heads: int | None) -> int:
    """`key_heads`, each of which serves heads / key_heads value heads; None is one a head.

    Raises:
        ConfigError: key_heads does not divide heads.
    """
    if key_heads is None:
        return heads
    if key_heads < 1 or heads % key_heads:
        raise ConfigError(
            f"mixer {mixer!r}: value heads do not share the key heads evenly",
            f"{heads} value heads over {key_heads} key heads",
            "choose a number of key heads that divides the value heads",
        )
    return key_heads


def scaled_dim(mixer: str, head_dim: int, factor: float) -> int:
    """`head_dim * factor`, which must be a whole number of at least 1.

    Raises:
        ConfigError: it is not.
    """
    size = round(head_dim * factor)
    if size < 1 or abs(size - head_dim * factor) > 1e-6:
        raise ConfigError(
            f"mixer {mixer!r}: a head dim that is no whole number",
            f"head_dim {head_dim} x {factor} = {head_dim * factor:g}",
        )
    return size


def split(x: Tensor, *sizes: tuple[int, int]) -> list[Tensor]:
    """x [B, n, sum of heads x dim] cut into [B, n, heads, dim] for each (heads, dim)."""
    parts = x.split([heads * dim for heads, dim in sizes], -1)
    return [part.unflatten(-1, size) for part, size in zip(parts, sizes, strict=True)]
