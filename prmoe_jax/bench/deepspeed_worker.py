"""DeepSpeed's MoE layer, timed in a process of its own for `prmoe bench moe`."""

from prmoe_jax.allocator import keep_freed_memory
from prmoe_jax.bench.worker import serve


def layer(path: str, d_ff: int, keep_memory: bool):
    """Returns a function that runs one forward and backward pass; top 1, capacity factor 1.

    Args:
      path: an .npz with x [S, M] and w_router [M, E].
      d_ff: the experts' hidden width.
      keep_memory: whether to call `keep_freed_memory`.
    """
    if keep_memory:
        keep_freed_memory()
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
    serve(layer)
