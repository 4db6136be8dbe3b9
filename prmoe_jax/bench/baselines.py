"""Other libraries' implementations, each timed in a process of its own by `worker.worker`.

A public function returns the function to time. Its arguments come as JSON.
"""

import contextlib
import json
import os
import re
import resource
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from prmoe_jax.allocator import keep_freed_memory


def deepspeed_layer(path: str, d_ff: int, keep_memory: bool):
    """One forward and backward pass of DeepSpeed's MoE layer, with top 1 and capacity factor 1.

    `path` is an .npz with x [S, M] and w_router [M, E].
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
    expert = _mlp(d_model, d_ff)
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


def torch_step(shape: dict, weights: str, autocast: bool, compiled: bool, threads: int):
    """One step of AdamW for a GPT as a PyTorch user would write it, always on the same tokens.

    It has fused attention (SDPA), tied embeddings, clipping, and DeepSpeed's MoE layer where the
    schedule has experts. The process keeps the memory that it frees, as ours does.

    Args:
      shape: settings from `step._torch_shape`.
      weights: dtype of the parameters, and of AdamW's moments.
      autocast: whether products run in bfloat16 by `torch.autocast`.
      compiled: whether to use torch.compile.
      threads: number of PyTorch's threads.
    """
    keep_freed_memory()
    import torch
    from torch import nn
    from torch.nn import functional

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    width, heads = shape["d_model"], shape["heads"]
    if any(shape["schedule"]):
        _join_alone()

    def feed_forward(experts: int) -> nn.Module:
        mlp = _mlp(width, shape["d_ff"])
        if not experts:
            return mlp
        from deepspeed.moe.layer import MoE

        layer = MoE(
            width, mlp, num_experts=experts, k=shape["top_k"],
            capacity_factor=shape["capacity_factor"], min_capacity=shape["min_capacity"],
            drop_tokens=shape["drops"], use_residual=shape["residual"], use_rts=False,
        )  # fmt: skip
        layer.set_deepspeed_parallelism()
        return layer

    class Block(nn.Module):
        def __init__(self, experts: int):
            super().__init__()
            self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.moe, self.mlp = bool(experts), feed_forward(experts)

        def forward(self, x):
            batch, length, _ = x.shape
            qkv = self.qkv(self.norms[0](x)).view(batch, length, 3, heads, width // heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
            y = self.mlp(self.norms[1](x))
            return (x + y[0], y[1]) if self.moe else (x + y, 0.0)

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Embedding(shape["vocab_size"], width)
            self.positions = nn.Embedding(shape["length"], width)
            self.blocks = nn.ModuleList([Block(experts) for experts in shape["schedule"]])
            self.norm = nn.LayerNorm(width)

        def forward(self, ids, targets):
            x, aux = self.tokens(ids) + self.positions.weight, 0.0
            for block in self.blocks:
                x, more = block(x)
                aux = aux + more
            logits = functional.linear(self.norm(x), self.tokens.weight).float()
            loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            return loss + shape["aux_loss_weight"] * aux

    model = GPT().to(getattr(torch, weights))
    rate = shape["learning_rate"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    run = torch.compile(model) if compiled else model
    ids = torch.randint(0, shape["vocab_size"], (shape["batch_size"], shape["length"] + 1))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = run(ids[:, :-1], ids[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), shape["clip_norm"])
        optimizer.step()
        loss.item()

    return step


def decoding(settings: dict, experts: dict, dtype: str, threads: int):
    """Greedy decoding by transformers; the function returns the seconds after the first token.

    Args:
      settings: the content of the model's `config.json`.
      experts: `experts_implementation` of a model with experts; else empty.
      dtype: dtype of the parameters.
      threads: number of PyTorch's threads.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = AutoConfig.for_model(**settings)
    kind = getattr(torch, dtype)
    model = AutoModelForCausalLM.from_config(config, dtype=kind, **experts).eval()

    def run(batch: int, prompt: int, tokens: int) -> float:
        ids, times = torch.randint(0, model.config.vocab_size, (batch, prompt)), []

        def after_a_token(ids, scores):
            times.append(time.perf_counter())
            return torch.zeros(batch, dtype=torch.bool)

        with torch.inference_mode():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                max_new_tokens=tokens + 1, min_new_tokens=tokens + 1,
                stopping_criteria=[after_a_token],
            )  # fmt: skip
        return times[-1] - times[0]

    return run


def _mlp(width: int, hidden: int):
    from torch import nn

    act = nn.GELU(approximate="tanh")
    return nn.Sequential(nn.Linear(width, hidden), act, nn.Linear(hidden, width))


def _join_alone() -> None:
    """Starts a process group of one process, without which DeepSpeed's layer can't run."""
    import deepspeed

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
    }  # fmt: skip
    deepspeed.init_distributed("gloo", verbose=False)


def _serve(make: Callable[..., Callable[..., float | None]]) -> None:
    """Calls the function from `make(**settings)` for each line of input.

    A line holds the call's arguments. The answer is the call's seconds, measured here unless the
    function returns them, and the process's peak memory in bytes.
    """
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the answers
        run = make(**json.loads(sys.argv[2]))
    for line in sys.stdin:
        begun = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            own = run(*json.loads(line))
        taken = time.perf_counter() - begun
        print(json.dumps([taken if own is None else own, peak_bytes()]), flush=True)


def peak_bytes() -> int:
    """The peak memory of this process.

    On Linux `ru_maxrss` is too large: it starts from the peak of the parent process.
    """
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes, on macOS


if __name__ == "__main__":
    _serve(globals()[sys.argv[1]])
