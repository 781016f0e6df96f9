"""A transformer that uses the mechanism: its parts, losses, decoding and files."""
