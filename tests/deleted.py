"""Runs `moepp` from a copy of the package: deleted.py FOLDER ARGUMENT..."""

import runpy
import sys

for name in list(sys.modules):
    if name.partition(".")[0] == "moepp_megatron":
        del sys.modules[name]
sys.path.insert(0, sys.argv[1])
sys.argv = ["moepp", *sys.argv[2:]]
runpy.run_module("moepp_megatron.cli.main", run_name="__main__", alter_sys=True)
