"""Bytes and tensors: no model."""
