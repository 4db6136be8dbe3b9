"""A PyTorch GPT's training step, timed in a process of its own for `prmoe bench step`.

The model is what a PyTorch user would write: fused attention (SDPA), tied embeddings, clipping,
AdamW, and DeepSpeed's MoE layer where the schedule has experts. The process keeps the memory that
it frees, as ours does.
"""

import os
import socket

from prmoe_jax.allocator import keep_freed_memory
from prmoe_jax.bench.worker import serve


def train_step(shape: dict, threads: int, compiled: bool):
    """Returns a function that makes one step of AdamW, always on the same random tokens.

    Args:
      shape: settings from `step._torch_settings`.
      threads: number of PyTorch's threads.
      compiled: whether to use torch.compile.
    """
    keep_freed_memory()
    import torch
    from torch import nn
    from torch.nn import functional

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    width, heads, hidden = shape["d_model"], shape["heads"], shape["d_ff"]
    if any(shape["schedule"]):
        _join_alone()

    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.w_in, self.w_out = nn.Linear(width, hidden), nn.Linear(hidden, width)

        def forward(self, x):
            return self.w_out(functional.gelu(self.w_in(x), approximate="tanh"))

    def feed_forward(experts: int) -> nn.Module:
        if not experts:
            return MLP()
        from deepspeed.moe.layer import MoE

        layer = MoE(
            width, MLP(), num_experts=experts, k=shape["top_k"],
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

    model = GPT().to(getattr(torch, shape["dtype"]))
    rate = shape["learning_rate"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    run = torch.compile(model) if compiled else model
    ids = torch.randint(0, shape["vocab_size"], (shape["batch_size"], shape["length"] + 1))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = run(ids[:, :-1], ids[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), shape["clip_norm"])
        optimizer.step()
        loss.item()

    return step


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


if __name__ == "__main__":
    serve(train_step)
