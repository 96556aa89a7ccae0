"""Softmax attention on one device: blockwise with any visibility, and the sliding window."""
