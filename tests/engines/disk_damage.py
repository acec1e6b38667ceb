"""What a bad disk does to a node's files: one byte in every 64 KiB is another."""

from pathlib import Path


def damage(nvme: Path) -> int:
    """Flip a byte in every 64 KiB that is not empty; return how many."""
    return sum(_damage(path) for path in nvme.rglob("*.data"))


def _damage(path: Path) -> int:
    flipped = 0
    with path.open("r+b") as file:
        for at in range(65_000, path.stat().st_size, 65_536):
            file.seek(at)
            byte = file.read(1)
            if byte and byte != b"\0":
                file.seek(at)
                file.write(bytes([byte[0] ^ 0xFF]))
                flipped += 1
    return flipped
