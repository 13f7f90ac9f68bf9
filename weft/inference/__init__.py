"""Inference under a plan."""
