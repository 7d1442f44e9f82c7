"""Seeds as pure functions of what they are for, so that no generator's state needs saving."""

import hashlib


def seed_for(*purpose: str | int) -> int:
    """A 63-bit seed that depends on the whole of `purpose` alone: seed_for("order", seed, epoch)."""
    return int.from_bytes(hashlib.blake2b(repr(purpose).encode(), digest_size=8).digest(), "little") >> 1
