"""Random seeds: every random draw of a run is seeded with a hash of the run's seed and of what the draw is for."""

import hashlib


def random_key(*parts) -> int:
    """A 63-bit seed made from, for example, (seed, step, index). It is the only source of randomness of a run."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1
