"""What torch's own allow-list of pickles may call, with the arguments that are meant.

torch calls whatever is on the list with whatever the pickle has for it, so that one of them can be made to call
another, or to take memory for any number of elements.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from typing import Any

import torch

from dcp_fast._torch import (
    get_layout,
    rebuild_from_type,
    tensor_rebuild_functions,
    tensor_types,
    weights_only_unpickler,
)
from dcp_fast.unpickling import NAMESPACES, check_attributes, cost_of, expect

# The place of the backward hooks among the arguments, which torch calls one day.
_HOOKS = {
    "_rebuild_parameter": 2,
    "_rebuild_parameter_with_state": 2,
    "_rebuild_tensor_v2": 5,
    "_rebuild_tensor_v3": 5,
    "_rebuild_qtensor": 6,
}


def known_to_torch() -> dict[str, Any]:
    """torch's allow-list, by the names in a pickle."""
    allowed: dict[str, Any] = weights_only_unpickler._get_allowed_globals()
    return allowed


def call_of_torch(function: Any, arguments: tuple[Any, ...], users: dict[int, Any], pay: Callable[[int], None]) -> Any:
    """Call a function or class of torch's list.

    Args:
        function, arguments: of the call.
        users: what is allowed by ``torch.serialization.add_safe_globals``, by its id.
        pay: for bytes that are copied.
    """
    pay(cost_of(arguments))
    name = getattr(function, "__name__", type(function).__name__)
    if function is torch.Size:
        kinds = list(map(type, arguments))
        expect(kinds in ([], [tuple], [list], [torch.Size]), "a torch.Size of other than numbers")
        expect(all(type(n) is int for items in arguments for n in items), "a torch.Size of other than numbers")
        return torch.Size(*arguments)
    if function is torch.device:
        expect(all(type(argument) in (str, int) for argument in arguments), "a torch.device of other than a name")
        return torch.device(*arguments)
    # A namespace can have all that these functions look for in a tensor.
    expect(not any(type(argument) in NAMESPACES for argument in arguments), f"a call of {name} with other than tensors")
    if function is rebuild_from_type:
        return _rebuild_from_type(arguments, users, pay)
    if isinstance(function, type) and any(function is cls for cls in tensor_types()):
        expect(not arguments, f"a call of {name}, which takes memory of any size")
    elif function is torch.nn.Parameter:
        expect(bool(arguments) and isinstance(arguments[0], torch.Tensor), "a parameter without a tensor")
    elif name in ("_rebuild_device_tensor_from_cpu_tensor", "_rebuild_device_tensor_from_numpy"):
        expect(len(arguments) == 4 and type(arguments[1]) is torch.dtype, f"a call of {name} with other arguments")
        source, dtype = arguments[:2]
        expect(isinstance(source, torch.Tensor) or type(source).__name__ == "ndarray", f"a call of {name} of no tensor")
        # A copy has all elements, also of a tensor that repeats one of them without end.
        pay(math.prod(source.shape) * dtype.itemsize)
    elif name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_qtensor"):
        _check_rebuilt(name, arguments)
        if name == "_rebuild_qtensor":  # it may have a scale and a zero for each index of a dimension
            pay(16 * max(arguments[2], default=0))
    else:
        known = (*tensor_rebuild_functions(), get_layout)
        expect(any(function is each for each in known), f"a call of {name}")
    if name in _HOOKS and len(arguments) > _HOOKS[name]:
        _check_hooks(arguments[_HOOKS[name]])
    if name == "_rebuild_parameter_with_state":
        _check_state(arguments[-1], pay)
    return function(*arguments)


def _rebuild_from_type(arguments: tuple[Any, ...], users: dict[int, Any], pay: Callable[[int], None]) -> Any:
    name = "_rebuild_from_type_v2"
    expect(len(arguments) == 4 and type(arguments[2]) is tuple, f"a call of {name} with other arguments")
    function, cls, inner, state = arguments
    known = id(cls) in users or cls is torch.Tensor or cls is torch.nn.Parameter
    expect(known, f"a call of {name} with a class that is no tensor")
    if id(cls) not in users or getattr(cls, "__setstate__", None) is torch.Tensor.__setstate__:
        _check_state(state, pay)
    if id(function) not in users:
        rebuilds = tensor_rebuild_functions()
        expect(any(function is known for known in rebuilds), f"a call of {name} with other than torch's functions")
        rebuilt = call_of_torch(function, inner, users, pay)
        # Again by torch's function, which gives it its class and its attributes.
        return rebuild_from_type(lambda: rebuilt, cls, (), state)
    return rebuild_from_type(function, cls, inner, state)


def set_tensor(tensor: Any, state: Any) -> None:
    """Set the state of a tensor or parameter, as pickles before torch 0.4 have it."""
    cls = type(tensor)
    expect(type(state) is tuple and (len(state) == 4 or cls is not torch.Tensor), "a tensor of other state")
    if len(state) == 4:
        _check_rebuilt("a state", state)
        expect(state[0].dtype == tensor.dtype, "a tensor with a storage of another type")
        torch.Tensor.set_(tensor, *state)
        return
    expect(len(state) in (3, 5), "a parameter of other state")
    _check_hooks(state[2])
    cls.__setstate__(tensor, state)


def _check_hooks(hooks: Any) -> None:
    empty = hooks is None or (type(hooks) in (dict, collections.OrderedDict) and not hooks)
    expect(empty, "a tensor with backward hooks")


def _check_state(state: Any, pay: Callable[[int], None]) -> None:
    """Refuse what would stand in front of what a tensor has, such as ``set_``, in its ``__dict__`` or its slots."""
    if type(state) is tuple:
        pay(cost_of(state))
    for attributes in state if type(state) is tuple else (state,):
        if attributes is not None:
            check_attributes(torch.Tensor, attributes)


def _check_rebuilt(name: str, arguments: tuple[Any, ...]) -> None:
    """Refuse a tensor that is larger than its storage, which torch would let grow."""
    least = 7 if name == "_rebuild_tensor_v3" else 4
    expect(len(arguments) >= least, f"a call of {name} with other arguments")
    storage, offset, size, stride = arguments[:4]
    expect(type(storage) is torch.storage.TypedStorage, "a tensor without a storage")
    expect(type(offset) is int and offset >= 0, "a tensor without an offset")
    for numbers in (size, stride):
        expect(type(numbers) in (tuple, list, torch.Size), "a tensor without a shape")
        expect(all(type(n) is int and n >= 0 for n in numbers), "a tensor without a shape")
    expect(len(size) == len(stride), "a tensor without a shape")
    if 0 in size:
        return
    if name == "_rebuild_tensor_v3":
        expect(type(arguments[6]) is torch.dtype, "a tensor without a dtype")
    if name == "_rebuild_qtensor":  # is made whole before it takes the storage
        elements = math.prod(size)
    else:
        elements = 1 + offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    itemsize = arguments[6].itemsize if name == "_rebuild_tensor_v3" else storage.dtype.itemsize
    expect(elements * itemsize <= storage._untyped_storage.nbytes(), "a tensor that is larger than its storage")
