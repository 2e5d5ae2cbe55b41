"""Has Transformer Engine's own Python find a stub in place of its compiled extension.

The stub, `transformer_engine_torch`, has the names, arguments and enums of the C++ source, refuses
what pybind would refuse, and answers with `functions.FUNCTIONS`.
"""

import functools
import importlib
import inspect
import os
import sys
from enum import IntEnum
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import torch
from torch._subclasses.fake_tensor import FakeTensor

from tests.fake_gpu.engine import attention, router  # noqa: F401  their functions are in FUNCTIONS
from tests.fake_gpu.engine.declarations import REQUIRED, enums, functions, takes
from tests.fake_gpu.engine.functions import FUNCTIONS, HOST
from tests.fake_gpu.record import RECORD, owner

NAME = "transformer_engine_torch"
# Imported at once, and called only for an export or for generation.
_NOT_PLAYED = ("einops", "onnx", "onnxscript")


def install(source):
    """Import Transformer Engine from the path, over a stub made from its unpacked source."""
    sys.modules[NAME] = _extension(source)
    for name in _NOT_PLAYED:
        sys.modules.setdefault(name, _Absent(name))
    # It would load its compiled library on import, and its extension after that.
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    package = ModuleType("transformer_engine")
    (path,) = (each for each in sys.path if Path(each, "transformer_engine/pytorch").is_dir())
    package.__path__ = [str(Path(path, "transformer_engine"))]
    sys.modules["transformer_engine"] = package
    common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None
    del sys.modules["transformer_engine"]
    importlib.import_module("transformer_engine.pytorch")
    sys.modules["transformer_engine"].common = common  # type: ignore[attr-defined]
    _know_fake_tensors()


def _know_fake_tensors():
    """Let fake tensors pass where the exact type is asked for: attention, and offloading."""
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    try:
        offload_v1 = importlib.import_module("transformer_engine.pytorch.cpu_offload_v1")
    except ImportError:  # older versions have one way to offload
        offload_v1 = importlib.import_module("transformer_engine.pytorch.cpu_offload")
    mark = offload_v1.mark_activation_offload

    def marked(*tensors, offload=True):
        for tensor in tensors:
            if type(tensor) is not FakeTensor:
                mark(tensor, offload=offload)
            elif not offload:
                tensor._TE_do_not_offload = True

    offload_v1.mark_activation_offload = marked

    describe = utils.AttentionParams.__init__

    def described(self, *args, **kwargs):
        describe(self, *args, **kwargs)
        if self.qkv_type is FakeTensor:
            self.qkv_type = torch.Tensor

    utils.AttentionParams.__init__ = described


def forget_tensors():
    """Empty Transformer Engine's caches of tensors, which are another case's."""
    for name in [name for name in sys.modules if name.startswith("transformer_engine.pytorch")]:
        for value in vars(sys.modules[name]).values():
            if isinstance(value, functools._lru_cache_wrapper):
                value.cache_clear()
            elif isinstance(value, dict) and any(
                isinstance(each, torch.Tensor) for each in value.values()
            ):
                value.clear()


class _Absent(ModuleType):
    """A package that is not installed and whose names are asked for on import."""

    def __init__(self, name):
        super().__init__(name)
        # torch looks for packages by it.
        self.__spec__ = ModuleSpec(name, None)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


def _extension(source):
    module = ModuleType(NAME)
    kinds = enums(source)
    vars(module).update(kinds)
    for name in ("FP8TensorMeta", "CommOverlapHelper", "CommOverlap", "CommOverlapP2P"):
        setattr(module, name, type(name, (), {}))
    for name in ("CommOverlapCore", "CommOverlapBase", "CommOverlapP2PBase"):
        setattr(module, name, type(name, (), {}))
    declared = functions(source)
    for name, parameters in declared.items():
        setattr(module, name, _checked(name, parameters, kinds))
    return module


def _checked(name, parameters, kinds: dict[str, type[IntEnum]]):
    function = FUNCTIONS.get(name)
    wanted = [] if function is None else list(inspect.signature(function).parameters.values())
    names = {parameter.name for parameter in parameters}
    if any(each.default is each.empty and each.name not in names for each in wanted):
        # Of another version, whose function takes other arguments.
        function = None

    def call(*args, **kwargs):
        given = _bound(name, parameters, args, kwargs, kinds)
        if function is None:
            raise NotImplementedError(f"the stub of Transformer Engine's extension has no {name}")
        if name not in HOST:
            RECORD.operations[f"{NAME}.{name}"] += 1
            RECORD.owners[owner()] += 1
        return function(**{each.name: given[each.name] for each in wanted if each.name in given})

    return call


def _bound(name, parameters, args, kwargs, kinds: dict[str, type[IntEnum]]):
    """Arguments by name, as pybind finds them."""
    if len(args) > len(parameters):
        raise TypeError(f"{name}: {len(args)} arguments for {len(parameters)}")
    given = dict(zip((each.name for each in parameters), args, strict=False))
    if doubled := given.keys() & kwargs.keys():
        raise TypeError(f"{name}: {doubled} given twice")
    given |= kwargs
    if unknown := kwargs.keys() - {each.name for each in parameters if each.named}:
        raise TypeError(f"{name} has no {unknown}")
    for each in parameters:
        if each.name not in given:
            if each.default is REQUIRED:
                raise TypeError(f"{name} needs {each.name}")
            given[each.name] = each.default
        elif not takes(each.kind, given[each.name], kinds):
            what = type(given[each.name]).__name__
            raise TypeError(f"{name}: {each.name} is a {each.kind}, not a {what}")
    return given
