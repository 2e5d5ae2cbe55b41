"""A program for an environment with llama-cpp-python: greedy answers of a GGUF, with logprobs.

python llama_cpp_answers.py MODEL.gguf TEXTS.json OUT.json
"""

import json
import sys
from pathlib import Path

import numpy as np
from llama_cpp import GGML_TYPE_F32, Llama

model, texts, out = sys.argv[1:]
# Keys and values are in half precision by default, which changes logprobs by more than 1e-3.
cache = {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32}
llama = Llama(model, n_ctx=256, n_threads=1, logits_all=True, verbose=False, **cache)
answers = []
for text in json.loads(Path(texts).read_text()):
    tokens = llama.tokenize(text.encode(), add_bos=False)
    start = len(tokens)
    llama.reset()
    llama.eval(tokens)
    for _ in range(8):
        tokens.append(int(llama.scores[len(tokens) - 1].argmax()))
        llama.eval(tokens[-1:])
    logits = llama.scores[: len(tokens) - 1].astype(np.float64)
    picked = logits[np.arange(len(logits)), tokens[1:]]
    logprobs = list(picked - np.logaddexp.reduce(logits, axis=1))
    answers.append({"prompt": tokens[:start], "tokens": tokens[start:], "logprobs": logprobs})
Path(out).write_text(json.dumps(answers))
