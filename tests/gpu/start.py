"""One rank of a run whose settings are in a YAML file: what torchrun starts."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rich.console import Console

from radio.config import read_yaml
from train.commands import train_all
from train.config import TrainConfig

if __name__ == "__main__":
    train_all({"run": read_yaml(TrainConfig, Path(sys.argv[1]))}, Console())
