"""Merging softmax attention over disjoint sets of keys."""
