"""DeepSpeed's MoE layer, timed in a process of its own for `prmoe bench moe`.

It reads lines. To 'run' it answers with the seconds of one forward and backward pass, and to
'memory' with the process's peak memory in bytes.
"""

import argparse
import contextlib
import sys

from prmoe_jax.allocator import keep_freed_memory
from prmoe_jax.bench.worker import answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("input", help="an .npz with x [S, M] and w_router [M, E]")
    parser.add_argument("d_ff", type=int)
    parser.add_argument("--keep-memory", action="store_true")
    options = parser.parse_args()
    if options.keep_memory:
        keep_freed_memory()
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the answers
        run = layer(options.input, options.d_ff)
    answer(run)


def layer(path: str, d_ff: int):
    """A function that runs the layer forward and backward once; top 1, capacity factor 1."""
    import numpy as np
    import torch
    from deepspeed.moe.layer import MoE

    arrays = np.load(path)
    x_SxM = torch.tensor(arrays["x"], requires_grad=True)
    w_MxE = torch.tensor(arrays["w_router"])
    d_model, experts = w_MxE.shape
    expert = torch.nn.Sequential(
        torch.nn.Linear(d_model, d_ff),
        torch.nn.GELU(approximate="tanh"),
        torch.nn.Linear(d_ff, d_model),
    )
    moe = MoE(d_model, expert, num_experts=experts, k=1, capacity_factor=1.0, use_rts=False)
    with torch.no_grad():
        moe.deepspeed_moe.gate.wg.weight.copy_(w_MxE.T)
    cotangent_SxM = torch.randn_like(x_SxM)

    def run() -> None:
        moe.zero_grad(set_to_none=True)
        x_SxM.grad = None
        y_SxM, aux_loss, _ = moe(x_SxM)
        ((y_SxM * cotangent_SxM).sum() + aux_loss).backward()

    return run


if __name__ == "__main__":
    main()
