"""Writes megatron/: a PR-MoE checkpoint by DeepSpeed's own engine, and the model's logits.

    pip install -e '.[interop]'   # the CPU is enough
    python tests/goldens/generate_megatron.py [--out DIR] [--checkpoint DIR] [--load DIR]

The model is a small torch one with the names, nesting and arithmetic of Megatron-DeepSpeed's GPT
(which installs only from source) around `deepspeed.moe.layer.MoE`; DeepSpeed trains it for a step
and saves it. `--checkpoint` keeps the checkpoint as it is; `--load` takes the parameters from
another one, through the engine's load_checkpoint, instead. What is committed is checkpoint.npz, its
tensors by file and name, with the arguments and the logits.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ.get("MASTER_PORT", "29517")}

import deepspeed
import numpy as np
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import nn

D, HEADS, F, LENGTH, VOCAB = 16, 2, 20, 12, 300
ARGUMENTS = argparse.Namespace(
    num_layers=4,
    num_experts=[3, 5],  # of the 2nd and the 4th layer
    mlp_type="residual",
    topk=1,
    num_attention_heads=HEADS,
    num_key_value_heads=HEADS,
    ffn_hidden_size=F,
    hidden_dropout=0.0,
    layernorm_epsilon=1e-5,
    bias_gelu_fusion=True,
    moe_train_capacity_factor=1.0,
    moe_eval_capacity_factor=5.0,  # as many as experts: nothing is dropped
    moe_min_capacity=4,
    moe_token_dropping=True,
    tensor_model_parallel_size=1,
    params_dtype=torch.float32,
)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense_h_to_4h, self.dense_4h_to_h = nn.Linear(D, F), nn.Linear(F, D)

    def forward(self, x):
        return self.dense_4h_to_h(nn.functional.gelu(self.dense_h_to_4h(x), approximate="tanh"))


class Attention(nn.Module):
    """Queries, keys and values head by head, as Megatron's since checkpoint version 2."""

    def __init__(self):
        super().__init__()
        self.query_key_value, self.dense = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x_BxLxD):
        b, length, _ = x_BxLxD.shape
        qkv = self.query_key_value(x_BxLxD).view(b, length, HEADS, 3, D // HEADS)
        q, k, v = (qkv[:, :, :, i].transpose(1, 2) for i in range(3))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.dense(y.transpose(1, 2).reshape(b, length, D))


class Layer(nn.Module):
    def __init__(self, experts: int):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(D), nn.LayerNorm(D)
        self.self_attention = Attention()
        self.mlp = MLP()
        if experts:
            args = ARGUMENTS
            self.mlp = MoE(
                D,
                self.mlp,
                num_experts=experts,
                k=args.topk,
                use_residual=args.mlp_type == "residual",
                capacity_factor=args.moe_train_capacity_factor,
                eval_capacity_factor=args.moe_eval_capacity_factor,
                min_capacity=args.moe_min_capacity,
                drop_tokens=args.moe_token_dropping,
            )

    def forward(self, x):
        x = x + self.self_attention(self.input_layernorm(x))
        y = self.mlp(self.post_attention_layernorm(x))
        return x + (y[0] if isinstance(y, tuple) else y)


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        model = self.language_model = nn.Module()
        model.embedding, model.encoder = nn.Module(), nn.Module()
        model.embedding.word_embeddings = nn.Embedding(VOCAB, D)
        model.embedding.position_embeddings = nn.Embedding(LENGTH, D)
        model.encoder.layers = nn.ModuleList([Layer(e) for e in (0, 3, 0, 5)])
        model.encoder.final_layernorm = nn.LayerNorm(D)

    def forward(self, ids_BxL):
        model = self.language_model
        x = model.embedding.word_embeddings(ids_BxL)
        x = x + model.embedding.position_embeddings.weight[: ids_BxL.shape[1]]
        for layer in model.encoder.layers:
            x = layer(x)
        return model.encoder.final_layernorm(x) @ model.embedding.word_embeddings.weight.T

    def state_dict(self, *args, **kwargs):
        """Nested as Megatron's: experts at the top by their whole names, all else by part."""
        flat = super().state_dict(*args, **kwargs)
        nested = {n: x for n, x in flat.items() if "deepspeed_experts" in n}
        embedding, encoder = {}, {}
        for name, tensor in flat.items():
            words = name.split(".")
            if words[1] == "embedding":
                embedding[words[2]] = {"weight": tensor}
            elif name not in nested:
                encoder[name.removeprefix("language_model.encoder.")] = tensor
        return nested | {"language_model": {"embedding": embedding, "encoder": encoder}}

    def load_state_dict(self, state, strict=True):
        nested = state.pop("language_model")
        flat = {f"language_model.encoder.{n}": x for n, x in nested["encoder"].items()} | state
        for name, part in nested["embedding"].items():
            flat[f"language_model.embedding.{name}.weight"] = part["weight"]
        return super().load_state_dict(flat, strict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "megatron")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--load", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)  # which tokens overflow in the step
    deepspeed.init_distributed("gloo", verbose=False)
    rng = np.random.default_rng(0)
    model = GPT()
    with torch.no_grad():
        for parameter in model.parameters():
            values = 0.3 * rng.normal(size=parameter.shape) + (parameter.ndim == 1)
            parameter.copy_(torch.tensor(values))
    groups = {"params": list(model.parameters()), "name": "all"}
    groups = split_params_into_different_moe_groups_for_optimizer(groups)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(groups, lr=1e-3, momentum=0.9),
        config={"train_batch_size": 1},
    )
    ids_BxL = torch.tensor(rng.integers(0, VOCAB, (3, LENGTH)))
    if options.load:
        engine.load_checkpoint(options.load, load_module_only=True)
    else:
        engine.backward(engine(ids_BxL).square().mean())
        engine.step()
    engine.eval()
    with torch.inference_mode():  # a sequence at a time: one routing group, as ours
        logits = torch.cat([engine(row[None]) for row in ids_BxL]).numpy()
    with tempfile.TemporaryDirectory() as folder:
        folder = options.checkpoint or Path(folder)
        client = {"args": ARGUMENTS, "checkpoint_version": 3.0, "iteration": 1}
        client["rng_state"] = np.random.get_state()
        engine.save_checkpoint(folder, client_state=client)
        arrays = tensors(folder / "global_step1") if not options.load else {}
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in vars(ARGUMENTS).items() if k != "params_dtype"}
    versions = {"deepspeed": deepspeed.__version__, "torch": torch.__version__}
    arrays |= {"ids": ids_BxL.numpy(), "logits": logits}
    arrays |= {"arguments": json.dumps(settings), "versions": json.dumps(versions)}
    np.savez_compressed(options.out / "checkpoint.npz", **arrays)


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """Of the files of a checkpoint of ours, 'FILE|NAME' and the values."""
    named = {}
    for path in sorted(folder.glob("*model_states.pt")):
        state = torch.load(path, weights_only=False)  # written above
        if "module" in state:
            state = flat(state["module"])
        named |= {f"{path.name}|{name}": tensor.numpy() for name, tensor in state.items()}
    return named


def flat(state: dict, prefix: str = "") -> dict:
    named = {}
    for name, value in state.items():
        if isinstance(value, dict):
            named |= flat(value, f"{prefix}{name}.")
        else:
            named[prefix + name] = value
    return named


if __name__ == "__main__":
    main()
