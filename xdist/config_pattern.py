"""A model's layers as one line of text: `"(gated_deltanet,mlp)*3,attention,mlp"`."""

from __future__ import annotations

from difflib import get_close_matches

from xdist.errors import ConfigError

# What a pattern of each kind of model may name; a test compares the second with the registry.
LAYER_KINDS = ("linear", "attention")
MIXERS = (
    "attention",
    "deltanet",
    "gated_deltanet",
    "gated_linear",
    "gla",
    "hgrn2",
    "kda",
    "lightning",
    "linear",
    "mamba",
    "mamba2",
    "prefix",
    "retention",
    "sse",
)
KNOWN = {"hybrid_lm": LAYER_KINDS, "mixer_lm": ("mlp", *MIXERS)}
EXAMPLES = {
    "hybrid_lm": 'write e.g. "linear*3,attention*1"',
    "mixer_lm": 'write e.g. "(gla,mlp)*3,attention,mlp"',
}
# A pattern is a line of text; more layers than this are a slip of the keyboard.
MOST_LAYERS = 10_000


def parse_pattern(pattern: str, kind: str = "hybrid_lm") -> tuple[str, ...]:
    """`"linear*3,attention*1"` as `("linear", "linear", "linear", "attention")`.

    Items in brackets are repeated together: `"(gla,mlp)*2"` is `"gla,mlp,gla,mlp"`.

    Raises ConfigError for an unknown kind, a count below 1, brackets that do not pair, or an empty
    pattern.
    """
    layers: list[str] = []
    for item in _items(pattern, kind):
        inner, _, count = item.rpartition(")")
        if inner:
            repeated = parse_pattern(inner.strip().removeprefix("("), kind)
            name, star, count = "", *_parted(count)
            if not star and count:
                raise _brackets(pattern, kind)
        else:
            name, star, count = (part.strip() for part in item.partition("*"))
            repeated = (_known(name, pattern, kind),)
        if star and not (count.isascii() and count.isdigit() and int(count) > 0):
            raise ConfigError(
                f"model.pattern: {item.strip()!r} in {pattern!r} has no count of at least 1",
                "a layer is kind*count, or kind for one",
                EXAMPLES[kind],
            )
        if len(layers) + len(repeated) * int(count or 1) > MOST_LAYERS:
            raise ConfigError(
                f"model.pattern: {pattern!r} has too many layers", f"at most {MOST_LAYERS}"
            )
        layers += repeated * (int(count) if star else 1)
    return tuple(layers)


def _items(pattern: str, kind: str) -> list[str]:
    """The items between commas that no bracket holds."""
    items, depth = [""], 0
    for letter in pattern:
        depth += (letter == "(") - (letter == ")")
        if depth < 0:
            raise _brackets(pattern, kind)
        if letter == "," and not depth:
            items.append("")
        else:
            items[-1] += letter
    opened = [item for item in items if "(" in item]
    if depth or any(not item.strip().startswith("(") for item in opened):
        raise _brackets(pattern, kind)
    return items


def _parted(text: str) -> tuple[str, str]:
    """What follows a bracket: a star or nothing, and the count."""
    stripped = text.strip()
    star = "*" if stripped.startswith("*") else ""
    return star, stripped.removeprefix("*").strip()


def _known(name: str, pattern: str, kind: str) -> str:
    known = KNOWN[kind]
    if name in known:
        return name
    near = get_close_matches(name, known, 1)
    raise ConfigError(
        f"model.pattern: unknown layer {name!r} in {pattern!r}",
        f"known layers: {', '.join(known)}",
        f"did you mean {near[0]!r}?" if near else EXAMPLES[kind],
    )


def _brackets(pattern: str, kind: str) -> ConfigError:
    return ConfigError(
        f"model.pattern: the brackets in {pattern!r} do not fit",
        "a group is (layers)*count, or (layers) for one",
        EXAMPLES[kind],
    )
