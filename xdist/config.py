"""The typed tree of settings: read from TOML, checked whole, frozen. Imports no torch.

To add a setting, add a field with a description (and its unit) to its section below: loading,
overrides, `xdist show` and docs/config.md follow from the model. `load` lives in
`config_load.py`, checks over several keys in `config_checks.py`; both are re-exported here.
"""

from __future__ import annotations

import pathlib
from math import prod
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from xdist.config_checks import problems, raise_problems
from xdist.config_launch import Launch, Mpi, Ray, Slurm
from xdist.config_pattern import parse_pattern
from xdist.config_section import AUTO, NONE, Amount, Count, Section, Sizes, Table, setting

if TYPE_CHECKING:
    from xdist.config_load import load, override, parse, to_toml

__all__ = ["Config", "load", "override", "parse", "parse_pattern", "to_toml"]


class Run(Section):
    """Where a run writes and what it draws from."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")] = setting(
        "run", "name of the run; its files are in directory/name"
    )
    directory: str = setting("runs", "folder that holds the runs")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = setting(
        0, "seed of the initial weights and of the data order"
    )
    threads: Count = setting(1, "CPU threads of each rank")
    kernels: Literal["auto", "triton", "torch", "reference"] = setting(
        "auto",
        "what computes the ops in training: auto takes triton on a GPU that it serves, else torch; "
        "reference is float64 and slow",
    )


class Model(Section):
    """The model; `kind` names its file in xdist/models."""

    kind: Literal["hybrid_lm", "mixer_lm", "transformers", "vdt", "mamba_nd", "axial"] = setting(
        "hybrid_lm",
        "hybrid_lm: linear and window attention, streamed; mixer_lm: any mixers and MLPs; "
        "transformers: a decoder of that library (extra: transformers); of grids: vdt, a video "
        "diffusion transformer; mamba_nd and axial, volume segmenters of scans and of attention",
    )
    config_class: str = setting(
        "", 'transformers: configuration class of that library, e.g. "LlamaConfig"'
    )
    vocab_size: Annotated[int, Field(ge=2)] = setting(256, "number of token ids; 256 for bytes")
    dim: Count = setting(96, "width of the residual stream, channels")
    pattern: str = setting(
        "linear*3,attention*1",
        "layers from bottom to top: kind*count, comma separated; (kind,kind)*count repeats several",
    )
    head_dim: Count = setting(32, "channels of one head; must divide dim")
    mlp_ratio: Annotated[float, Field(gt=0)] = setting(2.0, "hidden width of the MLPs over dim")
    conv_width: Count = setting(4, "taps of the causal convolution of a linear layer, tokens")
    window: Annotated[int | None, Field(ge=0), *NONE] = setting(
        256, 'keys to the left that an attention query sees besides its own; "none" is unlimited'
    )
    ngram_orders: Annotated[tuple[Annotated[int, Field(ge=2)], ...], Field(strict=True)] = setting(
        (), "orders of the hashed n-gram input embeddings, e.g. [2, 3, 4]; [] for none"
    )
    ngram_buckets: Count = setting(32768, "rows of each n-gram embedding table")
    dtype: Literal["float32", "float64"] = setting("float32", "dtype of the parameters")
    options: Annotated[dict[str, Any], AfterValidator(Table)] = setting(
        Table(),
        "mixer_lm: options of a mixer by its name, e.g. {gla = {expand_k = 1.0}}; transformers: "
        'arguments of config_class, e.g. {hidden_size = 64}, where "none" is None; grids: settings '
        "of that model alone",
    )
    recompute: bool = setting(
        True,
        "mixer_lm, transformers, grids: keep each layer's input and what it received, compute the "
        "rest again",
    )
    sizes: Sizes = setting(
        (), "grids: positions of one whole sample along each dim, e.g. [197, 233, 189] voxels"
    )
    patch: Sizes = setting(
        (), "grids: positions of one token along each dim, e.g. [2, 2, 2]; [] is 1 along each"
    )
    channels: Count = setting(1, "grids: channels of one position of a sample")
    classes: Annotated[int, Field(ge=2)] = setting(
        4, "mamba_nd, axial: classes that a position is told apart into"
    )
    depth: Count = setting(4, "grids: layers; of vdt pairs of a spatial and a temporal one")

    @property
    def layers(self) -> tuple[str, ...]:
        """The kind of each layer, bottom to top; of hybrid_lm and mixer_lm."""
        return parse_pattern(self.pattern, self.kind)


class Parallel(Section):
    """Degrees of the mesh and how layers cross ranks. ranks = data x ring x ulysses."""

    data: Annotated[int | None, Field(ge=1), *AUTO] = setting(
        None, 'ranks that read different sequences; "auto" is ranks / (ring x ulysses)'
    )
    ring: Count = setting(1, "outer factor of the ranks that share one sequence")
    ulysses: Count = setting(1, "inner factor of the ranks that share one sequence")
    layout: Literal["contiguous", "zigzag"] = setting(
        "contiguous", "which positions each sequence rank holds"
    )
    attention: Literal["auto", "ulysses", "ring", "gather", "halo", "2d"] = setting(
        "auto", "how attention layers cross ranks"
    )
    recurrent: Literal["auto", "scan", "switch"] = setting("auto", "how linear layers cross ranks")
    dim: Amount = setting(
        0, "grids: the dim in which samples are shared among the sequence ranks; the first is 0"
    )
    grid: Literal["dsp", "ulysses_both", "ulysses_one", "ring", "megatron_sp"] = setting(
        "dsp",
        "vdt: how its blocks cross ranks; dsp switches the sharded dim where the plan places it",
    )

    @property
    def sequence_ranks(self) -> int:
        """Ranks that share one sequence."""
        return self.ring * self.ulysses


class Data(Section):
    """The store of the samples and how it is read."""

    kind: Literal["text", "volume", "video"] = setting(
        "text",
        "text: tokens; volume: grids with a class at each position; video: grids alone, whose "
        "noise is learnt",
    )
    store: str = setting("", "path of the zarr store made by `xdist prepare`")
    documents: Literal["join", "separate"] = setting(
        "join", '"separate": no layer and no label crosses a document boundary'
    )
    held_out: str = setting("held_out", "array group of the store that evaluation reads")
    slab: Annotated[tuple[Amount, ...], Field(strict=True)] = setting(
        (),
        "volume: [dim, start, stop], positions whose classes are never trained on and are what "
        "evaluation scores, on the samples of training; [] evaluates those of data.held_out",
    )
    crop_box: Annotated[tuple[Amount, ...], Field(strict=True)] = setting(
        (),
        "the part of a sample that crops lie in: [start, stop] of each dim, one after another in "
        "one list; [] is all of it",
    )
    bias: Annotated[float, Field(ge=0, lt=1)] = setting(
        0.0,
        "volume: largest part by which a smooth field dims and brightens the image, as scanners "
        "do; 0 for none",
    )
    noise: Annotated[float, Field(ge=0)] = setting(
        0.0, "volume: standard deviation of noise added to the image, of 255; 0 for none"
    )
    degrade_seed: Annotated[int, Field(ge=0, lt=2**63)] = setting(
        0, "volume: seed of data.bias and data.noise; the same image in every step and evaluation"
    )
    prefetch: Count = setting(2, "batches read ahead by a thread")
    on_bad: Literal["stop", "skip"] = setting(
        "stop", "what to do with a sample whose chunk is missing or damaged"
    )
    max_bad: Amount = setting(0, 'samples that on_bad = "skip" may drop before the run stops')
    allow_fingerprint_change: bool = setting(
        False, "resume although the store is not the one of the checkpoint"
    )


class Stage(Section):
    """One stage of the curriculum."""

    length: Count = setting(4096, "text: tokens of one whole sequence, over all its ranks")
    crop: Sizes = setting(
        (), "grids: positions of one sample along each dim, cut from anywhere; [] is all of it"
    )
    batch: Count = setting(8, "sequences of one micro-step, over all data ranks")
    steps: Count = setting(100, "optimizer steps of this stage")


class Train(Section):
    """The loop."""

    curriculum: Annotated[tuple[Stage, ...], Field(min_length=1)] = setting(
        (Stage(),), "stages in order, each {length, batch, steps}, of grids {crop, batch, steps}"
    )
    accumulation: Count = setting(1, "micro-steps of one optimizer step")
    precision: Literal["float32", "bfloat16", "float64"] = setting(
        "float32", "dtype of matrix products; bfloat16 keeps parameters and sums in float32"
    )
    tile_tokens: Count = setting(4096, "tokens of one tile; bounds the memory of activations")
    max_skipped: Amount = setting(3, "steps in a row that may be skipped for non-finite values")
    step_timeout_s: Annotated[float, Field(gt=0)] = setting(
        600.0, "longest time of a step, waiting for other ranks included, seconds"
    )
    first_step_timeout_s: Annotated[float, Field(gt=0)] = setting(
        1800.0, "the same of the first step, which also compiles and warms up, seconds"
    )
    check_every_steps: Amount = setting(
        100, "optimizer steps between comparisons of the ranks' parameter hashes; 0 for never"
    )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.steps for stage in self.curriculum)


class Engine(Section):
    """What owns parameters, gradients and optimizer state, and how they are partitioned."""

    name: Literal["plain", "fsdp", "deepspeed"] = setting(
        "plain",
        '"plain" keeps everything whole on every rank, "fsdp" is torch\'s fully_shard, '
        '"deepspeed" is ZeRO',
    )
    zero_stage: Annotated[int, Field(ge=0, le=3)] = setting(
        2,
        "DeepSpeed: 1 partitions optimizer state over data x sequence ranks, 2 gradients too, "
        "3 parameters too; 0 nothing",
    )
    offload_optimizer: Literal["none", "cpu"] = setting(
        "none", "DeepSpeed stages 1 to 3: where the optimizer state is kept and updated"
    )
    offload_parameters: Literal["none", "cpu"] = setting(
        "none", "DeepSpeed stage 3: where parameters wait that no layer needs now"
    )
    reshard: bool = setting(
        True, "fsdp: free a layer's whole parameters after its forward pass and gather them again"
    )
    deepspeed: Annotated[dict[str, Any], AfterValidator(Table)] = setting(
        Table(), "DeepSpeed keys passed on as they are; those that xdist decides are refused"
    )


class Optimizer(Section):
    """Update rule and learning-rate schedule."""

    name: Literal["adamw", "sgd", "muon"] = setting(
        "adamw", 'update rule; "muon" for the matrices of the layers, AdamW for the rest'
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = setting(
        0.0, 'momentum of name = "sgd", per step; 0 keeps no state'
    )
    learning_rate: Annotated[float, Field(gt=0)] = setting(3e-3, "peak learning rate")
    muon_learning_rate: Annotated[float, Field(gt=0)] = setting(
        0.02, 'peak learning rate of Muon\'s matrices (name = "muon")'
    )
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
        Field(strict=True),
    ] = setting((0.9, 0.95), "decay of the first and of the second moment, per step")
    eps: Annotated[float, Field(gt=0)] = setting(1e-8, "added to the root of the second moment")
    weight_decay: Annotated[float, Field(ge=0)] = setting(0.1, "decoupled decay, per learning rate")
    warmup_steps: Amount = setting(50, "optimizer steps of linear warm-up")
    schedule: Literal["cosine", "constant"] = setting("cosine", "shape after the warm-up")
    final_ratio: Annotated[float, Field(ge=0, le=1)] = setting(
        0.1, "last learning rate over the peak (cosine)"
    )
    clip_norm: Annotated[float, Field(gt=0)] = setting(1.0, "largest global norm of the gradients")


class Checkpoint(Section):
    """Saving and resuming."""

    every_steps: Amount = setting(0, "optimizer steps between saves; 0 saves only at the end")
    keep: Count = setting(2, "newest checkpoints that are kept")
    resume: Literal["auto", "strict", "never"] = setting(
        "auto",
        '"auto" takes the newest good checkpoint, "strict" stops if the newest is bad, '
        '"never" starts afresh and refuses a folder that holds checkpoints',
    )
    asynchronous: bool = setting(
        False, "a save blocks the step only while tensors are copied; a thread writes them"
    )
    allow_batch_change: bool = setting(
        False, "resume although the global batch or the curriculum is not that of the checkpoint"
    )


class Evaluate(Section):
    """Held-out bits per byte; of volumes also Dice by class."""

    every_steps: Amount = setting(0, "optimizer steps between evaluations; 0 only at the end")
    tokens: Count = setting(1_048_576, "held-out tokens read by one evaluation")
    length: Count = setting(262_144, "tokens of one evaluated sequence")
    samples: Count = setting(8, "grids: held-out samples read by one evaluation")


class Certify(Section):
    """`xdist certify`: the sharded model against the unsharded one."""

    length: Count = setting(2048, "tokens of the certified sequence")
    sizes: Sizes = setting(
        (), "grids: positions of the certified sample along each dim; [] is model.sizes"
    )
    ranks: Annotated[tuple[Count, ...], Field(min_length=1)] = setting(
        (1, 2, 3), "numbers of sequence ranks that are compared"
    )


class Log(Section):
    """What is written besides metrics.jsonl."""

    tensorboard: bool = setting(False, "write TensorBoard events (extra: tensorboard)")
    every_steps: Count = setting(1, "optimizer steps between progress lines")


class Config(Section):
    """A whole run. Every section may be left out."""

    run: Run = setting(Run(), "")
    model: Model = setting(Model(), "")
    parallel: Parallel = setting(Parallel(), "")
    data: Data = setting(Data(), "")
    train: Train = setting(Train(), "")
    engine: Engine = setting(Engine(), "")
    optimizer: Optimizer = setting(Optimizer(), "")
    checkpoint: Checkpoint = setting(Checkpoint(), "")
    evaluate: Evaluate = setting(Evaluate(), "")
    certify: Certify = setting(Certify(), "")
    log: Log = setting(Log(), "")
    launch: Launch = setting(Launch(), "")
    slurm: Slurm = setting(Slurm(), "")
    ray: Ray = setting(Ray(), "")
    mpi: Mpi = setting(Mpi(), "")

    @model_validator(mode="after")
    def _cross_checks(self, info: ValidationInfo) -> Config:
        # `load` runs the same checks itself, to list them beside the errors of single keys.
        if not (info.context and info.context.get("collecting")):
            raise_problems(problems(self), "config")
        return self

    def tokens_of(self, stage: Stage) -> int:
        """Tokens of one sample of a stage, over all ranks that share it."""
        crop = stage.crop or self.model.sizes
        patch = self.model.patch or (1,) * len(crop)
        tokens = prod(-(-size // each) for size, each in zip(crop, patch, strict=True))
        return tokens if crop else stage.length

    @property
    def run_directory(self) -> pathlib.Path:
        """The folder of this run's metrics, status, logs and checkpoints."""
        return pathlib.Path(self.run.directory) / self.run.name

    @property
    def ranks(self) -> int:
        """Number of ranks: `launch.ranks`, or the product of the degrees."""
        if self.launch.ranks is not None:
            return self.launch.ranks
        return (self.parallel.data or 1) * self.parallel.sequence_ranks

    @property
    def data_degree(self) -> int:
        """Number of data ranks: `parallel.data`, or what the sequence ranks leave."""
        return self.parallel.data or self.ranks // self.parallel.sequence_ranks


def __getattr__(name: str) -> Any:
    # config_load needs Config, so its functions are looked up on first use.
    if name in {"load", "override", "parse", "to_toml"}:
        from xdist import config_load

        return getattr(config_load, name)
    raise AttributeError(f"module 'xdist.config' has no attribute {name!r}")
