"""One page about any number of runs."""
