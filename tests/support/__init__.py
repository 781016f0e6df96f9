"""What tests of several rooms share: oracles, small models and datasets, processes. Fixtures are in conftest files."""

from pathlib import Path

ROOT = Path(__file__).parents[2]  # of the repository
