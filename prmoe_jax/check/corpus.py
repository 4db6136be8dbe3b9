"""How fast the corpus of a config is read, beside what its training step can use."""

import logging
import time

from prmoe_jax.check.findings import FAIL, OK, Finding, Part, rate, slow
from prmoe_jax.config.schema import Config
from prmoe_jax.data import cache
from prmoe_jax.data.pipeline import load_data, train_iterator
from prmoe_jax.model.sizes import cost
from prmoe_jax.parallel import processes
from prmoe_jax.parallel.axes import local_rows
from prmoe_jax.parallel.mesh import training_mesh

log = logging.getLogger(__name__)

SECONDS = 3.0  # of reading
# A step is taken to reach this share of the rate of a square product.
UTILISATION = 0.5
SLOW = 0.5  # a process's rate, as a share of the median of all, below which its host is named


def check(config: Config, products: list[float]) -> Part:
    """Reads batches as training does; text that was not prepared before is prepared first.

    Args:
      config: the experiment.
      products: measured rates of a product in the config's dtype on every device, in FLOP/s.
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
    # In tokens of whole batches, of which each process reads its rows.
    rates = processes.gathered(read * config.tokens_per_step / seconds)
    needed = UTILISATION * sum(products) / cost(config.model, config.moe).train_flops_per_token
    numbers = {"tokens_per_s": rates, "needed_tokens_per_s": needed}
    line = f"{rate(min(rates), 'token')} read, {rate(needed, 'token')} used by a step at "
    line += f"{UTILISATION:.0%} of the products' rate"
    fix = "put data.cache_dir on a local disk, or the token shards nearer"
    if behind := slow(dict(enumerate(rates)), SLOW):
        line = ", ".join(f"process {i} {rate(rates[i], 'token')}" for i in behind)
        return Part([Finding("read rate", FAIL, f"slow: {line}", fix)], numbers)
    status = OK if min(rates) >= needed else FAIL
    return Part([Finding("read rate", status, line, fix if status == FAIL else "")], numbers)
