"""Records of runs, as a sweep writes them."""


def record(arm, seed, loss, **changes):
    settings = {"model.layers": len(arm), "seed": seed}
    return {
        "run": f"{arm}/{seed}", "settings": settings, "seed": seed, "loss": loss,
        "bits_per_byte": loss / 2, "drop_fraction": 0.1, "tokens": 2000,
        "total_params": 3_000_000 + len(arm), "active_params": 1_000_000,
        "flops_per_token": 6_000_000, "tokens_per_second": 500.0, "device": "cpu",
        "layers": {"01": {"position_drop_fraction": [0.0, 0.2]}},
        "evaluations": [[1000, loss + 1], [2000, loss]], "losses": [[10, 9.0]],
        "revisions": ["abc"], "versions": {"jax": "0.1"},
    } | changes  # fmt: skip
