"""transformers' GPT-2, generating in a process of its own for `prmoe bench decode`.

It reads lines 'BATCH PROMPT TOKENS', and answers with the seconds of generating TOKENS tokens
greedily after the first one, for BATCH sequences with prompts of PROMPT tokens.
"""

import argparse
import contextlib
import json
import sys
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="GPT2Config's settings, as JSON")
    parser.add_argument("dtype", choices=["float32", "bfloat16"])
    parser.add_argument("threads", type=int)
    options = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the answers
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.set_num_threads(options.threads)
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(**json.loads(options.config))).eval()
        model.to(getattr(torch, options.dtype))

    def seconds(batch: int, prompt: int, tokens: int) -> float:
        ids, times = torch.randint(0, model.config.vocab_size, (batch, prompt)), []

        def after_a_token(ids, scores):
            times.append(time.perf_counter())
            return torch.zeros(batch, dtype=torch.bool)

        with torch.inference_mode(), contextlib.redirect_stdout(sys.stderr):
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens + 1,
                min_new_tokens=tokens + 1,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=[after_a_token],
            )
        return times[-1] - times[0]

    for line in sys.stdin:
        print(seconds(*map(int, line.split())), flush=True)


if __name__ == "__main__":
    main()
