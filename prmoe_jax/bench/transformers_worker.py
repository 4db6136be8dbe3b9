"""transformers' GPT-2, generating in a process of its own for `prmoe bench decode`."""

import time

from prmoe_jax.bench.worker import serve


def generation(shape: dict, dtype: str, threads: int):
    """Returns a function that decodes greedily, and returns the seconds after the first token.

    Args:
      shape: GPT2Config's settings.
      dtype: dtype of the parameters.
      threads: number of PyTorch's threads.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**shape)).eval()
    model.to(getattr(torch, dtype))

    def run(batch: int, prompt: int, tokens: int) -> float:
        ids, times = torch.randint(0, model.config.vocab_size, (batch, prompt)), []

        def after_a_token(ids, scores):
            times.append(time.perf_counter())
            return torch.zeros(batch, dtype=torch.bool)

        with torch.inference_mode():
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

    return run


if __name__ == "__main__":
    serve(generation)
