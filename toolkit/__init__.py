"""Harden image classifiers for deployment: prune, fine-tune adversarially, quantise to integer ONNX, and prove it."""

__version__ = "0.1.0"
