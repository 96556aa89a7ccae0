"""Whether a store of tokens fits its run, asked before the first step: what is read at the end of
a run is known at its start."""

from __future__ import annotations

from xdist.config import Config
from xdist.data import TextStore, evaluation_windows
from xdist.data.loader import check_samples
from xdist.data.store import Split
from xdist.errors import ConfigError, DataError
from xdist.mesh import Mesh
from xdist.train.feed import layout_of


def check_vocabulary(config: Config, store: TextStore) -> None:
    """Raises DataError where the model has no embedding for some token of the store."""
    size, have = store.vocabulary_size, config.model.vocab_size
    if size > have:
        raise DataError(
            f"the tokens of {store.path} are more than the model knows",
            f"the store's vocabulary has {size} tokens, model.vocab_size = {have}",
            f"set model.vocab_size={size}, or data.store to one prepared for this vocabulary",
        )


def check_sequences(config: Config, mesh: Mesh, store: TextStore) -> None:
    """Every sequence that a run will train on or evaluate can be made.

    Raises:
        DataError: no held-out split, or a length that does not fit the samples of a task.
        ConfigError: a sequence that leaves a rank without a token, where the model needs one.
    """
    documents = config.data.documents
    for stage in config.train.curriculum:
        check_samples(store.split("train"), stage.length, documents)
    split = _held_out(config, store)
    check_samples(split, config.evaluate.length, documents)
    if config.model.kind == "transformers":
        _check_shares(config, mesh, split)


def read_tokens(config: Config, split: Split) -> int:
    """How many of the split's first tokens are evaluated; of a task whole samples."""
    read = min(split.length, config.evaluate.tokens)
    return read - read % (split.sample_length or 1)


def _held_out(config: Config, store: TextStore) -> Split:
    name = config.data.held_out
    if name not in store.split_names:
        raise DataError(
            f"{store.path} has no split {name!r} to evaluate on",
            f"data.held_out = {name!r}, the store has {', '.join(store.split_names)}",
            "prepare the store with a held-out share above 0, or set data.held_out=train",
        )
    return store.split(name)


def _check_shares(config: Config, mesh: Mesh, split: Split) -> None:
    read, length = read_tokens(config, split), config.evaluate.length
    trained = {stage.length: "train.curriculum" for stage in config.train.curriculum}
    evaluated = {
        stop - start: f"evaluate.length = {length} of {read} tokens"
        for start, stop in evaluation_windows(read, length, read)
    }
    for size, setting in (evaluated | trained).items():
        shares = layout_of(config, size, mesh).local_lengths
        if 0 in shares:
            whole = read - read % length
            fits = f"evaluate.tokens={whole}, " if size in evaluated and whole else ""
            raise ConfigError(
                f"{setting} makes a sequence of {size} tokens, too short for the ranks",
                f"the {len(shares)} sequence ranks hold {list(shares)} of it, and a model of "
                "Transformers needs a token on each",
                f"set {fits}another length, or fewer sequence ranks",
            )
