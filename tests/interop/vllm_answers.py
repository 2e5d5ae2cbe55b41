"""A program for vLLM's own environment: greedy answers of its Transformers backend, with logprobs.

python vllm_answers.py EXPORT PROMPTS.json OUT.json [argument=json ...]
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

SETTINGS: dict[str, Any] = {
    "model_impl": "transformers",
    "trust_remote_code": True,
    "dtype": "float32",
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
}


def main() -> None:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    export, prompts, out, *given = sys.argv[1:]
    changes = {name: json.loads(value) for name, value in (pair.split("=", 1) for pair in given)}
    model = LLM(export, **(SETTINGS | changes))
    sampling = SamplingParams(
        temperature=0,
        max_tokens=8,
        logprobs=0,
        prompt_logprobs=0,
        ignore_eos=True,
        detokenize=False,
    )
    answers = []
    batch = [{"prompt_token_ids": ids} for ids in json.loads(Path(prompts).read_text())]
    for request in model.generate(batch, sampling):
        (done,) = request.outputs
        # The first token of a prompt has no logprob.
        asked = zip(request.prompt_token_ids[1:], request.prompt_logprobs[1:], strict=True)
        answered = zip(done.token_ids, done.logprobs, strict=True)
        logprobs = [chances[token].logprob for token, chances in (*asked, *answered)]
        answers.append({"tokens": list(done.token_ids), "logprobs": logprobs})
    Path(out).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
