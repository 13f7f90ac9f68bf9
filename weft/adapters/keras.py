"""Keras: the layers of a Keras 3 model as modules that own their parameters.

With the torch backend a ``keras.Layer`` is a torch module, but it keeps its weights in ``keras.Variable`` objects, and
a model lists those of all its layers in one dictionary; layers a model holds in a list are no children of it. Here

- every layer becomes a child of the layer that holds it: under its attribute's name, or, where a list holds it,
  under ``layer.`` and the layer's own name;
- a layer's weights become its own parameters (what trains) and buffers (what does not, such as moving averages), under
  ``torch_`` and the variable's name. The variable reads and writes that slot, so that whoever puts another tensor
  there (a shard, a fake tensor) changes what the layer computes with;
- generators of random numbers draw their seeds from torch's stream, since theirs is a counter, which would go on
  differently on every device;
- batch normalisation goes through torch's.

Keras itself is never imported here, only found where the user's code has imported it.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from weft.errors import InputError, ModelError

LIST = "layer"
"""Child that holds the layers a layer keeps in lists."""

MASK = "_keras_mask"
"""Where Keras keeps the mask of a tensor."""


def adapt(model: Any) -> Any:
    """Give the Keras layers in a model the face of modules, in place; any other model is left as it is.

    Returns:
        The model. It still computes what it did, and is still a Keras model.

    Raises:
        InputError: Keras runs on another backend than torch.
        ModelError: a layer has no weights yet.
    """
    kind = getattr(sys.modules.get("keras"), "Layer", None)
    if kind is None or not isinstance(model, (kind, nn.Module)):
        return model
    if not isinstance(model, nn.Module):
        raise InputError(
            f"the model is a Keras model on the {_backend()} backend, weft runs those on torch; set "
            "os.environ['KERAS_BACKEND'] = 'torch' in the file that makes it, before keras is imported"
        )
    layers = [module for module in model.modules() if isinstance(module, kind)]
    for layer in layers:
        _adapt(layer, kind)
    if layers:
        gc.collect()  # calls on samples leave graphs in cycles, and torch casts no fake tensor that is in a graph
    return model


def _adapt(layer: Any, kind: type) -> None:
    if "_torch_params" in vars(layer):  # done before
        return
    if not layer.built:
        raise ModelError(
            f"the Keras layer {layer.name!r} has no weights yet; let the factory call the model on a sample before it "
            "returns it"
        )
    layer._modules.pop("_torch_params", None)
    layer.__dict__["_torch_params"] = {}  # Keras would make it again if it were not there
    if "_functional" in layer._modules:  # a Sequential's view of itself
        layer.__dict__["_functional"] = layer._modules.pop("_functional")
    listed = nn.ModuleDict()
    named = set(layer._modules.values())
    for child in layer._layers:
        if child not in named:
            listed.add_module(_free(child.name, listed), child)
    for child in [*layer._modules.values(), *listed.children()]:
        if isinstance(child, kind):
            _adapt(child, kind)
    wrapped = [m for child in layer._modules.values() if not isinstance(child, kind) for m in child.modules()]
    homes = {id(tensor): (m, key) for m in wrapped for key, tensor in m._parameters.items()}
    if len(listed):
        layer._modules[_free(LIST, layer)] = listed
    for registry, variables in (
        ("_parameters", layer._trainable_variables),
        ("_buffers", layer._non_trainable_variables),
    ):
        for variable in variables:
            _house(layer, registry, variable, homes)
    for generator in layer._seed_generators:
        generator.__dict__["next"] = _next_seed
    names = layer.call_signature_parameters
    if any(f"{name}_mask" in names for name in names):
        layer.__dict__["forward"] = functools.partial(_masked, layer)
    if type(layer).call is sys.modules["keras"].layers.BatchNormalization.call:
        layer.__dict__["call"] = functools.partial(_normalized, layer)


def _normalized(layer: Any, inputs: Tensor, training: bool | None = None, mask: Tensor | None = None) -> Tensor:
    """Run a BatchNormalization through torch's own, which is met by whoever takes its statistics from more than this
    process' samples; Keras' own takes them with operations like any others."""
    if not (training and layer.trainable) or mask is not None or layer.renorm:
        return cast(Tensor, type(layer).call(layer, inputs, training=training, mask=mask))
    x = inputs.movedim(layer.axis, 1)
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.to(torch.float32)
    gamma, beta = (None if v is None else v.value.to(x.dtype) for v in (layer.gamma, layer.beta))
    mean, variance = x.new_zeros(2, x.shape[1])
    out = F.batch_norm(x, mean, variance, gamma, beta, training=True, momentum=1.0, eps=layer.epsilon)
    with torch.no_grad():
        # The variance is over n - 1 rows, Keras keeps the one over n. How many rows there are in all tells a channel of
        # known variance: a share m of ones among zeros, m (1 - m) over n.
        known = x.new_zeros(x.numel() // x.shape[1], 1)
        known[0] = 1
        m, unbiased = x.new_zeros(2, 1)
        F.batch_norm(known, m, unbiased, training=True, momentum=1.0)
        variance = variance * (m * (1 - m) / unbiased)
        for average, now in ((layer.moving_mean, mean), (layer.moving_variance, variance)):
            average.assign(average.value * layer.momentum + now.to(average.value.dtype) * (1 - layer.momentum))
    return out.movedim(1, layer.axis).to(inputs.dtype)


def _masked(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a layer whose code looks for masks on its tensors: Keras gives it a mask as an argument too, and who stands
    between the two (a hook) may have made the tensor anew."""
    given = layer._call_signature.bind_partial(*args, **kwargs).arguments
    for name, tensor in given.items():
        mask = given.get(f"{name}_mask")
        if isinstance(tensor, Tensor) and mask is not None and getattr(tensor, MASK, None) is None:
            setattr(tensor, MASK, mask)
    return type(layer).forward(layer, *args, **kwargs)


def _house(layer: Any, registry: str, variable: Any, homes: Mapping[int, tuple[nn.Module, str]]) -> None:
    """Move a variable's tensor into a slot of its layer, or find the slot of a torch module it is in already."""
    tensor = variable._value
    if tensor is None:
        raise ModelError(f"the Keras variable {variable.path!r} has no value yet; let the factory build the model")
    if id(tensor) in homes:  # of a wrapped torch module
        module, key = homes[id(tensor)]
    else:
        module, key = layer, _free(f"torch_{variable.name}", layer)
        vars(module)[registry][key] = tensor if registry == "_parameters" else tensor.detach()
    if "_home" not in vars(variable):  # a variable that two layers hold reads the first one's slot: they are tied
        del variable._value
        variable.__class__ = _housed(type(variable))  # type: ignore[arg-type]  # to mypy a type[Any] has no hash
        variable._home = (module, registry, key)


@functools.cache
def _housed(kind: type) -> type:
    """The class of variables of a kind that keep their value in a module's slot."""

    def get(self: Any) -> Tensor:
        module, registry, key = self._home
        value: Tensor = vars(module)[registry][key]
        return value

    def put(self: Any, value: Tensor) -> None:
        module, registry, key = self._home
        vars(module)[registry][key] = value

    return type(kind.__name__, (kind,), {"_value": property(get, put), "__module__": kind.__module__})


def _free(name: str, module: nn.Module) -> str:
    """A name for a child or slot that nothing else in the module has."""
    name = name.replace(".", "_")
    while hasattr(module, name):
        name += "_"
    return name


def _next_seed(ordered: bool = True) -> tuple[int, int]:
    """A seed from torch's stream, in the two halves Keras adds up. On fake tensors nothing is drawn."""
    fake = isinstance(torch.empty(0), FakeTensor)
    with _disable_current_modes():
        return (0 if fake else int(torch.randint(2**31 - 1, ())), 0)


class _Stream:
    """Stands for Keras' generator of everything that is not given one."""

    next = staticmethod(_next_seed)


@contextmanager
def making() -> Iterator[None]:
    """Let a factory make the same layers, under the same names, however often it is called in a process."""
    with _state({"torch_device": "cpu", "object_name_uids": defaultdict(int), "global_seed_generator": None}):
        yield


@contextmanager
def running(device: torch.device | str) -> Iterator[None]:
    """Run on a device, and draw from torch's stream."""
    with _state({"torch_device": str(device), "global_seed_generator": _Stream()}):
        yield


@contextmanager
def _state(values: Mapping[str, Any]) -> Iterator[None]:
    """Set attributes of Keras' global state inside the block. Errors inside it keep their own form and message."""
    state = sys.modules.get("keras.src.backend.common.global_state")
    if state is None or _backend() != "torch":
        yield
        return
    values = {**values, "traceback_filtering": False}
    before = {name: state.get_global_attribute(name) for name in values}
    for name, value in values.items():
        state.set_global_attribute(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            state.set_global_attribute(name, value)


def _backend() -> str:
    return str(sys.modules["keras"].config.backend())
