"""Adapters: models of frameworks on top of PyTorch, with the face of plain modules that own their parameters.

One file per framework. It gives three things, and nothing else in weft knows the framework:

    adapt(model)       called on what a factory made: the same object, its tensors in modules' own slots
    making()           around a factory
    running(device)    around a forward
"""

from weft.adapters.keras import adapt, making, running

__all__ = ["adapt", "making", "running"]
