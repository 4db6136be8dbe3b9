"""Checks that a config's corpus is read as fast as a training step needs it."""

import logging
import time

from prmoe_jax.check.findings import FAIL, OK, Finding, Part, rate, slow_processes
from prmoe_jax.config.schema import Config
from prmoe_jax.data import cache
from prmoe_jax.data.pipeline import load_data, train_iterator
from prmoe_jax.model.sizes import cost
from prmoe_jax.parallel import processes
from prmoe_jax.parallel.axes import local_rows
from prmoe_jax.parallel.mesh import training_mesh

log = logging.getLogger(__name__)

SECONDS = 3.0  # how long batches are read
# A training step is assumed to reach this share of the FLOP/s of a square matrix product.
UTILISATION = 0.5
SLOW = 0.5  # a process fails if its rate is below this share of the median


def check(config: Config, products: list[float]) -> Part:
    """Reads batches as training does; prepares the text first if that was not done before.

    `products` has each device's FLOP/s of a matrix product in the config's dtype.
    """
    log.info("corpus: %s", config.data.corpus)
    config, mesh = training_mesh(config)
    with processes.main_process_first(cache.root(config.data)):
        data = load_data(config.data, config.model.vocab_size, config.model.length)
    rows = local_rows(mesh, config.train.batch_size)
    batches = train_iterator(data.train, config.train.batch_size, config.seed, rows)
    next(batches)
    read, begun = 0, time.perf_counter()
    while (seconds := time.perf_counter() - begun) < SECONDS:
        next(batches)
        read += 1
    # Tokens of whole batches: each process reads only its own rows of a batch.
    rates = processes.gathered(read * config.tokens_per_step / seconds)
    needed = UTILISATION * sum(products) / cost(config.model, config.moe).train_flops_per_token
    numbers = {"tokens_per_s": rates, "needed_tokens_per_s": needed}
    line = f"{rate(min(rates), 'token')} read, {rate(needed, 'token')} used by a step at "
    line += f"{UTILISATION:.0%} of the products' rate"
    fix = "put data.cache_dir on a local disk, or the token shards nearer"
    if behind := slow_processes(rates, SLOW, "token"):
        line = f"slow: {behind}"
    elif min(rates) >= needed:
        return Part([Finding("read rate", OK, line)], numbers)
    return Part([Finding("read rate", FAIL, line, fix)], numbers)
