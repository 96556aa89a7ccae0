"""An op's strategies over the moves: attention, linear recurrences, the causal convolution."""
