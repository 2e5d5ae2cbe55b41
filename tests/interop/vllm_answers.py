"""A program for vLLM's own environment: greedy answers of its Transformers backend, with logprobs.

python vllm_answers.py EXPORT PROMPTS.json OUT.json [argument=json ...]
"""

import json
import os
import sys
from pathlib import Path

SETTINGS = {
    "model_impl": "transformers",
    "trust_remote_code": True,
    "dtype": "float32",
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
}


def engine(export, given, **changes):
    """vLLM's `LLM` of an export; `given` are arguments as JSON."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM

    stated = {name: json.loads(value) for name, value in (pair.split("=", 1) for pair in given)}
    return LLM(export, **(SETTINGS | changes | stated))


def sampling(**changes):
    """Greedy, with logprobs of the prompt and the answer."""
    from vllm import SamplingParams

    greedy = {"temperature": 0, "max_tokens": 8, "logprobs": 0, "prompt_logprobs": 0}
    return SamplingParams(**(greedy | changes), ignore_eos=True, detokenize=False)


def answers(model, prompts):
    """Tokens of the answers; logprobs of all tokens but a prompt's first."""
    found = []
    for request in model.generate([{"prompt_token_ids": ids} for ids in prompts], sampling()):
        (done,) = request.outputs
        asked = zip(request.prompt_token_ids[1:], request.prompt_logprobs[1:], strict=True)
        answered = zip(done.token_ids, done.logprobs, strict=True)
        logprobs = [chances[token].logprob for token, chances in (*asked, *answered)]
        found.append({"tokens": list(done.token_ids), "logprobs": logprobs})
    return found


def main():
    export, prompts, out, *given = sys.argv[1:]
    found = answers(engine(export, given), json.loads(Path(prompts).read_text()))
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
