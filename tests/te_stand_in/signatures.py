"""The signatures that the stand-in promises, or those of Transformer Engine under the same names.

    python -m tests.te_stand_in.signatures      prints the stand-in's as JSON

In a process of its own: the stand-in goes by the name of the package. `tests/gpu` compares.
"""

import importlib
import inspect
import json

# Where megatron-core imports from.
_MODULES = (
    "common.recipe",
    "pytorch",
    "pytorch.attention",
    "pytorch.attention.rope",
    "pytorch.distributed",
    "pytorch.optimizers",
    "pytorch.permutation",
    "pytorch.quantization",
    "pytorch.router",
)
# Not called itself, its methods are; and one that takes any keywords and hands them on.
_NOT_CALLED = ("FP8GlobalStateManager", "Recipe", "Format", "checkpoint", "FusedSGD")


def promised():
    """`module:name` of every function, class and forward pass of the stand-in: its parameters."""
    found = {}
    for module in _MODULES:
        path = f"transformer_engine.{module}"
        for name, thing in vars(importlib.import_module(path)).items():
            is_own = str(getattr(thing, "__module__", "")).startswith("transformer_engine")
            if not is_own or not callable(thing) or name.startswith("_") or name in _NOT_CALLED:
                continue
            found[f"{path}:{name}"] = parameters(thing)
            if _is_torch_module(thing):
                found[f"{path}:{name}.forward"] = parameters(thing.forward)
            if hasattr(thing, "initialize_state"):
                found[f"{path}:{name}.initialize_state"] = parameters(thing.initialize_state)
    return found


def _is_torch_module(thing):
    import torch

    return inspect.isclass(thing) and issubclass(thing, torch.nn.Module)


def parameters(function):
    """Names in order, without `self`."""
    return [name for name in inspect.signature(function).parameters if name != "self"]


def actual(path):
    """Parameters of what the installed Transformer Engine has under a name of `promised`.

    Raises:
        AttributeError: It has no such thing.
    """
    module, _, name = path.partition(":")
    thing = importlib.import_module(module)
    for part in name.split("."):
        thing = getattr(thing, part)
    return parameters(thing)


def fits(wanted, found):
    """True if `found` takes, with the same meaning, every call that `wanted` takes."""
    place = [found.index(name) if name in found else -1 for name in wanted]
    return -1 not in place and place == sorted(place)


if __name__ == "__main__":
    print(json.dumps(promised(), indent=1))
