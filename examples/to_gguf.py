"""Converts an export for llama.cpp with llama.cpp's own converter, and names our tokenizer's rule.

python examples/to_gguf.py LLAMA_CPP EXPORT [arguments of convert_hf_to_gguf.py]

LLAMA_CPP is a folder of llama.cpp's sources, EXPORT was made by `moepp convert mcore-to-hf
--layout vanilla`. The converter recognises how a tokenizer divides texts by a hash of token ids,
and so refuses every tokenizer that was trained anew. A tokenizer of `moepp data prepare` divides
texts as GPT-2's does, which llama.cpp has; of any other the converter decides.
"""

import json
import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run the converter."""
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    llama_cpp, export = (Path(name) for name in sys.argv[1:3])
    sys.path.insert(0, str(llama_cpp))
    tokenizer = json.loads((export / "tokenizer.json").read_text(encoding="utf-8"))
    rule = tokenizer["pre_tokenizer"] or {}
    ours = {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}
    if tokenizer["normalizer"] is None and ours.items() <= rule.items():
        from conversion.base import TextModel

        TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    sys.argv = ["convert_hf_to_gguf.py", *sys.argv[2:]]
    runpy.run_path(str(llama_cpp / sys.argv[0]), run_name="__main__")


if __name__ == "__main__":
    main()
