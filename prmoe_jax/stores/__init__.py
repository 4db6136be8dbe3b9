"""Folders in object stores (gs://BUCKET/FOLDER) beside local ones."""

from prmoe_jax.stores.paths import (
    as_local_path,
    as_path,
    check_reachable,
    client,
    delete_folder,
    expand,
    is_local,
    no_link,
    scheme,
    upload,
)
