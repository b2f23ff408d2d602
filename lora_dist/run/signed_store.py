"""What ranks tell each other in the rendezvous store, signed: whoever reaches its port can write into it."""

import hashlib
import hmac
import json
import sys
from typing import Any

import torch.distributed as dist


class SignedStore:
    """A store whose values only the ranks of this run can make. Values are what JSON can hold.

    `secret`: the same bytes on all ranks; it must not travel through the store. A value that is absent, damaged or
    somebody else's reads as None; the first one of somebody else's is said.
    """

    def __init__(self, store: dist.Store, secret: bytes):
        self.store, self._secret, self._warned = store, secret, False

    def set(self, name: str, value: Any) -> None:
        self.store.set(name, self._signed(name, value))

    def get(self, name: str) -> Any:
        return self._read(name, self.store.get(name)) if self.store.check([name]) else None

    def set_first(self, name: str, value: Any) -> Any:
        """Set the value unless a rank of this run has set one before. Returns the value that counts."""
        text = self._signed(name, value)
        found = self._read(name, self.store.compare_set(name, "", text))
        if found is None:  # somebody else came before the ranks
            self.store.set(name, text)
            return value
        return found

    def _signed(self, name: str, value: Any) -> str:
        text = json.dumps(value)
        return f"{self._code(name, text)} {text}"

    def _read(self, name: str, raw: bytes) -> Any:
        code, _, text = raw.decode(errors="replace").partition(" ")
        if hmac.compare_digest(code.encode(), self._code(name, text).encode()):
            return json.loads(text)
        if not self._warned:
            self._warned = True
            what = f"somebody else wrote {name!r} into the rendezvous store of this run"
            print(f"warning: {what}; it is ignored, but keep its port from others", file=sys.stderr, flush=True)
        return None

    def _code(self, name: str, text: str) -> str:
        return hmac.new(self._secret, f"{name} {text}".encode(), hashlib.sha256).hexdigest()
