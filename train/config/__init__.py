"""What a run is made of, read from YAML and `key.path=value` overrides."""

from train.config.read import ConfigError, dump_yaml, from_dict, load, to_dict
from train.config.schema import RunConfig

__all__ = ["ConfigError", "RunConfig", "dump_yaml", "from_dict", "load", "to_dict"]
