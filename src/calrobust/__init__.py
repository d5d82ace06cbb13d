"""Calibrated robust fine-tuning of CLIP-like models."""

__version__ = "0.1.0"
