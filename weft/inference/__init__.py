"""Inference: models that are run, not trained, under a plan."""
