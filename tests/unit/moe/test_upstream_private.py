"""The private names of megatron-core that MoE++ layers use: all listed, and missed by name."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import megatron.core
import pytest
from megatron.core import package_info
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAlltoAllTokenDispatcher,
    MoEFlexTokenDispatcher,
)
from megatron.core.transformer.transformer_layer import TransformerLayer

import moepp_megatron
from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.spec import get_moepp_layer_spec
from moepp_megatron.moe.upstream_private import (
    PRIVATE_NAMES,
    UpstreamMovedError,
    _moved_from,
    _PrivateName,
    check_upstream,
)
from moepp_megatron.moe.upstream_versions import RENAMED, TESTED_VERSION
from tests.unit.moe.builders import megatron_config

ROOT = Path(moepp_megatron.__file__).parent
# Whose classes extend megatron-core's.
ROOMS = ("moe", "model", "training/checkpoint")
LISTED = {private.name for private in PRIVATE_NAMES}
# Made by Python's abstract classes.
ABSTRACT = {"_abc_impl"}


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def files():
    # Private names in interop/bridge are Megatron-Bridge's, whose version tests/bridge pins.
    return sorted(path for path in ROOT.rglob("*.py") if path.parent.name != "bridge")


def defined_here():
    """Names that this package's own classes and modules define."""
    names = set()
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                # Not what is set in a module or an object of somebody else.
                and isinstance(node.value, ast.Name)
                and node.value.id in ("self", "ctx", "cls")
            ):
                names.add(node.attr)
    return names


def defined_upstream():
    """Private names that megatron-core defines: methods, classes, attributes, module variables."""
    pattern = re.compile(
        r"(?:def|class) (_[A-Za-z]\w*)|\bself\.(_[A-Za-z]\w*)\s*[:=]|^(_[A-Za-z]\w*)\s*[:=]", re.M
    )
    found = set()
    for path in Path(megatron.core.__path__[0]).rglob("*.py"):
        for groups in pattern.findall(path.read_text()):
            found |= {name for name in groups if name}
    return found


def own_classes():
    found = []
    for path in (path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))):
        if path.stem == "__init__" or "triton" in path.stem:
            continue
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        module = importlib.import_module(".".join(parts))
        classes = inspect.getmembers(module, inspect.isclass)
        found += [kind for _, kind in classes if kind.__module__ == module.__name__]
    return found


def test_every_attribute_that_is_used_is_listed():
    own, upstream = defined_here(), defined_upstream()
    lacking = {name for name in LISTED - upstream if RENAMED.get(name) not in upstream}
    assert not lacking, "the scan of megatron-core misses names"
    used = {
        (path.name, node.attr)
        for path in files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and is_private(node.attr)
    }
    assert {name for _, name in used} & LISTED, "the scan finds nothing"
    unlisted = {(file, name) for file, name in used if name in upstream - own - LISTED}
    assert not unlisted, f"add to upstream_private.PRIVATE_NAMES: {sorted(unlisted)}"


def test_every_method_that_is_overridden_is_listed():
    overridden = {
        name
        for kind in own_classes()
        for name in vars(kind)
        if is_private(name) and name not in ABSTRACT
        for base in kind.__mro__[1:]
        if base.__module__.startswith("megatron.") and name in vars(base)
    }
    listed = {private.name for private in PRIVATE_NAMES if private.use == "overridden"}
    assert overridden == listed


def test_every_private_name_that_is_imported_is_listed():
    imported = {
        alias.name
        for path in files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron")
        for alias in node.names
        if is_private(alias.name)
    }
    assert imported <= LISTED


def test_a_name_that_is_used_no_more_is_not_listed():
    text = "".join(path.read_text() for path in files() if path.stem != "upstream_private")
    assert {private.name for private in PRIVATE_NAMES if private.name not in text} == set()


def test_the_pinned_version_has_them_all():
    check_upstream.cache_clear()
    check_upstream(PRIVATE_NAMES)


def test_names_that_moved_are_told_before_a_layer_is_built(monkeypatch):
    moepp = MoEPPConfig(4)
    for name in ("_forward_post_mlp", RENAMED["_forward_post_mlp"]):
        monkeypatch.delattr(TransformerLayer, name, raising=False)
    monkeypatch.setattr(
        MoEAlltoAllTokenDispatcher, "_maybe_dtoh_and_synchronize", lambda self, where: None
    )
    monkeypatch.setattr(package_info, "__shortversion__", "0.20.0")
    check_upstream.cache_clear()
    with pytest.raises(UpstreamMovedError) as error:
        get_moepp_layer_spec(megatron_config(moepp), moepp, use_transformer_engine=False)
    message = str(error.value)
    assert message.startswith("megatron-core (0.20.0) must be 0.19.2, or have the private names")
    assert "TransformerLayer._forward_post_mlp is gone (residual addition" in message
    assert "_maybe_dtoh_and_synchronize has no point, tokens_per_expert any more" in message
    assert message.endswith("install megatron-core==0.19.2, or see docs/upgrading.md")
    assert "\n" not in message
    check_upstream.cache_clear()


@pytest.mark.parametrize("version", ["0.19.1", "0.21.0"])
def test_a_version_that_nobody_has_tried_is_refused(version, monkeypatch):
    monkeypatch.setattr(package_info, "__shortversion__", version)
    check_upstream.cache_clear()
    rule = f"megatron-core ({version}) must be at least 0.19.2 and below 0.21; "
    with pytest.raises(UpstreamMovedError, match=re.escape(rule)):
        check_upstream()


def test_what_only_the_trainer_needs_stops_only_the_trainer(monkeypatch):
    from moepp_megatron.config import UnfitError, parse_config
    from moepp_megatron.model.build import _build_chunks
    from tests.parallel.training_runs import settings

    monkeypatch.delattr(filesystem_async, "_results_queue")
    check_upstream.cache_clear()
    moepp = MoEPPConfig(4)
    get_moepp_layer_spec(megatron_config(moepp), moepp, use_transformer_engine=False)
    with pytest.raises(UnfitError, match="filesystem_async._results_queue is gone") as error:
        _build_chunks(parse_config(settings()))
    assert error.value.exit_code == 3
    check_upstream.cache_clear()


def test_a_class_or_an_attribute_that_is_gone_is_reported(monkeypatch):
    gone = _PrivateName("transformer.nowhere:Nothing._x", "called", "a reason")
    assert list(_moved_from(gone)) == ["transformer.nowhere.Nothing is gone"]
    in_module = _PrivateName("tensor_parallel.random:_X", "read", "a reason")
    assert list(_moved_from(in_module)) == ["tensor_parallel.random._X is gone (a reason)"]
    attribute = next(private for private in PRIVATE_NAMES if private.name == "_comm_manager")
    assert list(_moved_from(attribute)) == []

    def without(self):
        pass

    monkeypatch.setattr(MoEFlexTokenDispatcher, "__init__", without)
    (line,) = _moved_from(attribute)
    assert line.startswith("MoEFlexTokenDispatcher._comm_manager is gone (DeepEP gets")


def test_the_tested_version_is_the_pinned_one():
    constraints = (ROOT.parent / "constraints.txt").read_text()
    assert f"megatron-core=={TESTED_VERSION}\n" in constraints
