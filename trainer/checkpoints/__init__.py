"""Checkpoints: saved, verified, restored onto any mesh."""
