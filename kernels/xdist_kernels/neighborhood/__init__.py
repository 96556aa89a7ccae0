"""Softmax attention over small sets of an N-D grid: neighbourhoods, blocks, strided sets."""
