"""Seeds of everything a run draws at random: each is a hash of the run's seed and what it is drawn for."""

import hashlib


def random_key(*what) -> int:
    """A 63-bit seed made from e.g. (seed, step, index): the only source of randomness of a run."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:8], "little") >> 1
