"""How good a narrower PR-MoE is before any training, by what was left out of its teacher.

prmoe train --config=configs/tiny.py:prmoe --workdir=runs/prmoe     # the teacher, once
python experiments/mos/width.py [--teacher=runs/prmoe]
"""

import argparse
import logging
from pathlib import Path

import jax

from prmoe_jax.cli import parse_config
from prmoe_jax.data.pipeline import load_data
from prmoe_jax.distill.teacher import init_from_teacher, restore_teacher
from prmoe_jax.model.loss import forward
from prmoe_jax.parallel.mesh import make_mesh, replicated
from prmoe_jax.training.evaluate import evaluate_model

TINY = Path(__file__).parent.parent.parent / "configs" / "tiny.py"
CUTS = {
    "hidden units 512 to 256": ["model.d_ff=256"],
    "width 128 to 96, heads 4 to 3": ["model.d_model=96", "model.heads=3"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path, default=Path("runs/prmoe"))
    teacher = parser.parse_args().teacher
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    for cut, changes in CUTS.items():
        losses = [
            student_loss(teacher, changes, importance) for importance in ("weights", "taylor")
        ]
        print(f"| {cut} | {losses[0]:.4f} | {losses[1]:.4f} |", flush=True)


def student_loss(teacher: Path, changes: list[str], importance: str) -> float:
    """Validation loss in nats a token, the whole split."""
    settings = [f"teacher.workdir={teacher}", "teacher.inherit=true", *changes]
    settings.append(f"teacher.importance={importance}")
    config = parse_config([f"--config={TINY}:prmoe", *(f"--config.{s}" for s in settings)])
    mesh = make_mesh(config)
    data = load_data(config.data, config.model.vocab_size, config.model.length)
    with jax.set_mesh(mesh):
        taught_by = restore_teacher(config, mesh, data.tokenizer)
        model = init_from_teacher(config, taught_by, data, mesh)
        step = jax.jit(forward, out_shardings=replicated(mesh))
        return evaluate_model(step, model, config, data, mesh)["loss"]


if __name__ == "__main__":
    main()
