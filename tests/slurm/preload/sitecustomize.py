"""On the path of the jobs' interpreters: a launcher of ranks imports once for all that it starts.

It imports what ranks need before it runs, and forks torchrun and the ranks from then on
(tests/warm.py), also after a failure.
"""

import gc
import importlib
import os
import sys
import warnings

if sys.orig_argv[1:5] == ["-P", "-m", "moepp_megatron.cli.main", "train"]:
    from tests import warm
    from tests.parallel.rank_worker import PRELOADED_MODULES

    # What imports make lives as long as the process.
    gc.disable()
    # As runtime/cpu_support.py sets it, but before megatron-core is imported.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in PRELOADED_MODULES:
            importlib.import_module(name)
    gc.enable()
    warm.install()
