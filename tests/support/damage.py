"""Damage to checkpoints, as disks and people do it."""

from pathlib import Path


def damage_newest_checkpoint(workdir: Path) -> None:
    """Flips a bit of the newest checkpoint's largest file of arrays."""
    newest = max((p for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal()), key=lambda p: int(p.name))
    path = max(newest.glob("state/ocdbt.process_*/d/*"), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)
