"""What other Megatron loops import."""

import subprocess
import sys

import moepp_megatron


def test_exports_are_there() -> None:
    from moepp_megatron.moe.config import MoEPPConfig
    from moepp_megatron.moe.spec import get_moepp_layer_spec

    assert moepp_megatron.MoEPPConfig is MoEPPConfig
    assert moepp_megatron.get_moepp_layer_spec is get_moepp_layer_spec
    assert all(hasattr(moepp_megatron, name) for name in moepp_megatron.__all__)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, moepp_megatron, moepp_megatron.cli.main as m; "
        "heavy = {'torch', 'megatron', 'numpy', 'matplotlib'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
