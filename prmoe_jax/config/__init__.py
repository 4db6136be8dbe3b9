"""The experiment's settings: from an ml-collections ConfigDict to checked, frozen dataclasses.

Users' files import the settings' classes, `default_config`, `load`, `resolve` and `save` from here.
The package imports them from their modules, so that a model loads the declarations alone.
"""

import importlib

from prmoe_jax.config import architecture


def __getattr__(name: str):
    if name in ("load", "resolve", "save"):
        home = "loading"
    elif name == "default_config" or name.endswith("Config"):
        home = "schema"
    else:
        raise AttributeError(f"module 'prmoe_jax.config' has no attribute '{name}'")
    return getattr(importlib.import_module(f"prmoe_jax.config.{home}"), name)
