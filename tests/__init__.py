"""Tests. MOEPP_MEGATRON_CORE names a checkout of Megatron-LM to run them with."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if checkout := os.environ.get("MOEPP_MEGATRON_CORE"):
    if not Path(checkout, "megatron", "core", "package_info.py").exists():
        sys.exit(f"MOEPP_MEGATRON_CORE ({checkout}) must be a checkout of Megatron-LM; unset it")
    # Before the installed one, here and in processes that tests start; after our own `tests`.
    sys.path.insert(1, checkout)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), checkout, os.environ.get("PYTHONPATH")])
    )
