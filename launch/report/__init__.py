"""The page about the runs of the demo."""
