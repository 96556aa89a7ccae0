"""`make bench`: measures and writes docs/benchmarks/*.json and *.md. Names choose: `BENCH=startup`.

Run on a quiet machine: nothing here is asserted, everything is dated.
"""

from __future__ import annotations

import argparse
import sys

import attention_kept
import attention_kernels
import attention_overlap
import attention_zigzag
import checkpoints
import conv_nd
import conv_overlap
import delta
import dsp
import grid_scan
import learning
import memory
import mixers
import neighborhood
import overhead
import overlap
import packing
import peers
import precision
import record
import startup
import training
import vanilla

# name: (module, title, note)
BENCHMARKS = {
    "startup": (startup, "Starting up", "Wall time of a fresh process, median of 7, interleaved."),
    "overhead": (
        overhead,
        "One rank of xdist against its kernels",
        "Forward and backward of the public function with shard=None, beside the same kernels "
        "called in an autograd Function: medians of 20 interleaved pairs, CPU time. overhead is "
        "the median over pairs of xdist / kernels - 1; kernels again is the same of the kernels "
        "beside themselves, the noise of the machine.",
    ),
    "overlap": (
        overlap,
        "A slow exchange of states behind local work",
        "Two ranks with one thread each, 32,768 tokens a rank, 8 heads of 64 x 64 (selective_scan: "
        "512 channels of 16), float32. Every message of a scan is delivered late to the rank that "
        "needs it: forward the second rank, backward the first. time is the median over pairs of "
        "that rank's forward or backward; waited is how long its wait for the late message lasted, "
        "hidden = 1 - waited / delay. What can be computed ahead is the part that needs no state, "
        "of as many tiles as fit in 256 MiB.",
    ),
    "attention_overlap": (
        attention_overlap,
        "A slow ring behind local work",
        "Two ranks with one thread each, causal zigzag, 8,192 tokens a rank, 4 heads of 64, "
        "float32, forward and backward. Every message of the ring is delivered late to both ranks. "
        "time is the slower rank's median; waited is how long it waited for late messages, "
        "hidden = 1 - waited / delay. On two ranks the gradients of the only block of another rank "
        "go home last, with nothing left to do meanwhile.",
    ),
    "attention_zigzag": (
        attention_zigzag,
        "A causal ring with zigzag and with contiguous shares",
        "Two ranks with one thread each, heads of 64, float32, forward and backward between "
        "barriers, interleaved pairs: medians, and the median, lowest and highest ratio of a pair. "
        "Counted work gives 2/3: of the visible pairs the second contiguous share has three "
        "quarters, each zigzag share half.",
    ),
    "precision": (
        precision,
        "Error against float64 by length, dtype and ranks",
        "max|a - b| / max|b|. Two heads of 16 x 16 (selective_scan: 32 channels of 16), decays "
        "near 1, delta rule with keys of rank 4 and beta below 0.05. The reference is the same "
        "chunked kernel in float64 on one rank with the same rounded inputs, which tests hold to a "
        "loop over tokens within 1e-10. With bfloat16 the tokens are bfloat16 and steps, decays "
        "and beta float32; results are then rounded to bfloat16 (4e-3).",
    ),
    "training": (
        training,
        "The main job by length and ranks",
        "A step is forward, backward, gradient sum, clipping and update on one sequence; median "
        "without the first. Ranks have one thread each.",
    ),
    "memory": (
        memory,
        "Memory and time of long sequences on one rank",
        "Forward and backward of four layers of width 128 under checkpoint_grid, float32, one "
        "process a row; peak is the whole process's, bytes per token what it grew by over a run "
        "of 1,024 tokens. Rows of 8 Mi take a head, the others make the output and its gradient.",
    ),
    "learning": (
        learning,
        "What small models learn",
        "Share of right answers on held-out samples, five seeds each (data and initial weights), "
        "float32 on a CPU. Heads of 8 (sparse state expansion: two of 4), no MLPs. recall: width "
        "32, multi-query associative recall of 8 pairs in 32 tokens, 15 keys and 16 values, 1,000 "
        "steps of 64 samples; one who guesses among a sample's values has 1/8 right. local is "
        "attention to the token before, so that what follows needs no convolution to see pairs. "
        "passkey: width "
        "64, trained at 160 bytes, then at 2,048, evaluated at 2,048 and 16,384; by chance 1/10. "
        "found compares means, and counts the seeds in which the order is as expected: what does "
        "not reproduce at this size stands there. Sizes and learning rates were chosen by single "
        "runs, seeds 0 and 100 (16 pairs were not learnt in 700 steps; with heads of 16 plain "
        "linear attention answers all of 8 pairs) and not changed after the five seeds.",
    ),
    "checkpoints": (
        checkpoints,
        "How long a save blocks",
        "Median and longest of 4 saves, of the slowest rank, the first included: the whole call in "
        "the loop, with the check that replicas are equal, and with checkpoint.asynchronous the "
        "later moments at which a save in flight goes on. step is the median of steps that no save "
        "precedes; while a thread writes it shares the cores with the ranks.",
    ),
    "delta": (
        delta,
        "The delta rule beside the torch path of HuggingFace Transformers",
        "Forward and backward of the operation alone, float32, one sequence, two threads: medians "
        "of interleaved passes; ratio is Transformers / xdist for Gated DeltaNet, with the lowest "
        "and highest of the pairs. DeltaNet and KDA are xdist's.",
    ),
    "dsp": (dsp, dsp.TITLE, dsp.NOTE),
    "attention_kept": (attention_kept, attention_kept.TITLE, attention_kept.NOTE),
    "conv_nd": (conv_nd, conv_nd.TITLE, conv_nd.NOTE),
    "conv_overlap": (conv_overlap, conv_overlap.TITLE, conv_overlap.NOTE),
    "grid_scan": (grid_scan, grid_scan.TITLE, grid_scan.NOTE),
    "neighborhood": (neighborhood, neighborhood.TITLE, neighborhood.NOTE),
    "packing": (packing, packing.TITLE, packing.NOTE),
    "peers": (peers, peers.TITLE, peers.NOTE),
    "vanilla": (vanilla, vanilla.TITLE, vanilla.NOTE),
    "attention_kernels": (
        attention_kernels,
        "Attention on one device beside torch's scaled_dot_product_attention",
        "Causal, forward and backward of the kernels alone, heads of 64: medians of interleaved "
        "pairs; ratio is xdist / torch with the lowest and highest of the pairs, form is what "
        "served (kernels/xdist_kernels/attention/README.md). Torch gets packed documents one "
        "after another. In bfloat16 torch's gradients are summed in bfloat16, xdist's in float32.",
    ),
    "mixers": (
        mixers,
        "Mixers beside the torch paths of HuggingFace Transformers",
        "The same layer with the same weights, dim 128, float32, one sequence, two threads: "
        "medians of interleaved passes; ratio is Transformers / xdist, with the lowest and highest "
        "of the pairs. Their Mamba is a loop over tokens whose backward grows with the square of "
        "the length, so that its backward is measured on short sequences. Memory is the growth of "
        "the highest resident set of a process of its own, weights and input not counted.",
    ),
}


def main() -> int:
    """Runs the named benchmarks, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}")
    names = parser.parse_args().names or list(BENCHMARKS)
    if unknown := [name for name in names if name not in BENCHMARKS]:
        print(f"no benchmark {unknown}; there are {list(BENCHMARKS)}", file=sys.stderr)
        return 2
    for name in names:
        module, title, note = BENCHMARKS[name]
        rows = module.run(record.ROOT)
        path = record.write(name, title, f"make bench BENCH={name}", rows, note=note)
        print(path.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
