"""Writes what Megatron-DeepSpeed's `calculate_mos_loss` gives, for tests that run without torch.

    pip install -e '.[interop]'
    python tests/goldens/generate_mos.py [--out FILE]

Megatron-DeepSpeed isn't a package; its loss is the few lines of `mos_loss`, after its description:
log-softmax of the student, softmax of the teacher, both over the temperature, KLDivLoss with
reduction='batchmean', times T², over the sequence length. Values and the student's gradient are
float64.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch.nn import KLDivLoss, functional

BATCH, LENGTH, WIDTH, VOCABULARY = 3, 11, 6, 37


def mos_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Of logits [batch, length, vocabulary]."""
    log_student = functional.log_softmax(student / temperature, dim=2)
    from_teacher = functional.softmax(teacher / temperature, dim=2)
    divergence = KLDivLoss(reduction="batchmean")(log_student, from_teacher)
    return temperature**2 * divergence / student.shape[1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "mos.npz")
    out = parser.parse_args().out
    rng = np.random.default_rng(0)
    arrays = {
        "x": rng.normal(size=(BATCH, LENGTH, WIDTH)),
        "table": rng.normal(size=(VOCABULARY, WIDTH)),
        "teacher_x": rng.normal(size=(BATCH, LENGTH, WIDTH + 1)),
        "teacher_table": rng.normal(size=(VOCABULARY, WIDTH + 1)),
    }
    # What the test gives the library.
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    inputs = {name: torch.tensor(array, dtype=torch.float64) for name, array in arrays.items()}
    for temperature in (1.0, 2.5):
        x, table = (inputs[name].clone().requires_grad_() for name in ("x", "table"))
        teacher = inputs["teacher_x"] @ inputs["teacher_table"].T
        loss = mos_loss(x @ table.T, teacher, temperature)
        loss.backward()
        found = {"loss": loss.detach(), "d_x": x.grad, "d_table": table.grad}
        arrays |= {f"{name}_{temperature}": value.numpy() for name, value in found.items()}
    np.savez_compressed(out, **arrays)


if __name__ == "__main__":
    main()
