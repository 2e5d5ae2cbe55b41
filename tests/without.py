"""Runs `moepp` as where packages are not installed: without.py PACKAGE,... ARGUMENT..."""

import runpy
import sys

packages = sys.argv[1].split(",")
for name in list(sys.modules):
    if name.partition(".")[0] in (*packages, "moepp_megatron"):
        del sys.modules[name]
# What an import of these then finds is that there is no such module.
sys.modules |= dict.fromkeys(packages)  # type: ignore[arg-type]
sys.argv = ["moepp", *sys.argv[2:]]
runpy.run_module("moepp_megatron.cli.main", run_name="__main__", alter_sys=True)
