"""Agreement among ranks that survives the death of any of them.

Every rank hosts a small key-value store and talks to those of all others. Two operations are enough:

`exchange`: every rank publishes a word in its own store and reads everybody else's; a dead rank is noticed at once
(its store is gone), a silent one after the timeout.

`decide`: all ranks walk through the same list of stores; at each they propose a value with compare-and-set and go on
with what that store holds. One store that stays up makes everybody who passes it leave with the same value, and later
stores can only confirm it. So the outcome is common to all survivors as long as one store in the list outlives the
decision: consensus from f + 1 consensus objects of which f may crash.
"""

from __future__ import annotations

import atexit
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

from gemopt.exceptions import InputError, missing

try:
    import torch.distributed as dist
    from torch._C._distributed_c10d import Store, TCPStore
except ModuleNotFoundError as error:
    raise missing(error, __name__) from None

T = TypeVar("T")
AUTHORITIES = 8
SETUP_S = 600.0  # ranks come from loading a model, which takes some of them minutes longer than others
RESIGNED = "!"


class Council:
    """Control channel of an expert-parallel group.

    Parameters
    ----------
    group
        Process group of the ranks; used once, to tell each other where the stores are.
    timeout_s
        How long to wait for a rank that does not answer, once all have met: making a council waits `SETUP_S`.
    """

    def __init__(self, group: Any, timeout_s: float) -> None:
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.timeout_s = timeout_s
        self._session = self._turn = 0
        self._said: list[str] = []
        self.lost: dict[int, str] = {}
        self._own = TCPStore("0.0.0.0", 0, None, True, timedelta(seconds=timeout_s), wait_for_workers=False)
        addresses: list[Any] = [None] * self.size
        dist.all_gather_object(addresses, (_address(), socket.gethostname(), self._own.port), group=group)
        self._stores = [self._own if r == self.rank else self._connect(*a) for r, a in enumerate(addresses)]

        atexit.register(self._linger)

    def _linger(self, seconds: float = 5.0) -> None:
        """Before this process ends: let the others read its last word, so that an end does not look like a death."""
        wanted, deadline = self.size - 1 - len(self.lost), time.monotonic() + seconds
        while self._turn and self._own.add(self._key("read"), 0) < wanted and time.monotonic() < deadline:
            time.sleep(0.005)

    def close(self) -> None:
        """Let the others read the last word, then let go of all stores."""
        self._linger()
        atexit.unregister(self._linger)
        self._stores.clear()
        del self._own

    def _key(self, kind: str) -> str:
        return f"{kind}{self._session}.{self._turn}"

    def begin(self) -> None:
        """Start counting turns anew. All ranks do, also after turns that not all of them took part in."""
        self._session, self._turn = self._session + 1, 0

    def resign(self, reason: str) -> None:
        """Tell those who go on to the next turn that this rank does not."""
        self._own.set(f"word{self._session}.{self._turn + 1}", RESIGNED + reason)

    def _connect(self, address: str, host: str, port: int) -> Store:
        if host == socket.gethostname():
            address = "127.0.0.1"
        elif address.startswith("127."):
            address = host
        store = TCPStore(address, port, None, False, timedelta(seconds=max(self.timeout_s, SETUP_S)))
        store.set_timeout(timedelta(seconds=self.timeout_s))
        return store

    def exchange(self, word: str, timeout_s: float | None = None) -> list[str | None]:
        """[G] what every rank said in this turn, None for ranks that are dead or silent (see `lost`).

        The word of a rank that has resigned begins with `RESIGNED`.
        """
        self._turn += 1
        key = self._key("word")
        self._own.set(key, word)
        deadline = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        words: list[str | None] = []
        for rank, store in enumerate(self._stores):
            words.append(word if rank == self.rank else self._read(rank, store, key, deadline))
        if None not in words:  # then everybody is in this turn, and nobody reads what was said before
            for old in self._said:
                self._own.delete_key(old)
            self._said = []
        self._said += [key, self._key("read"), self._key("decision")]
        return words

    def _read(self, rank: int, store: Store, key: str, deadline: float) -> str | None:
        left = max(0.05, deadline - time.monotonic())

        def read() -> str:
            store.set_timeout(timedelta(seconds=left))
            word = bytes(store.get(key)).decode()
            store.add(key.replace("word", "read"), 1)
            return word

        return self._call(rank, read, left + 0.5)

    def decide(self, proposal: str) -> str:
        """The common decision of this turn: the proposal of some rank."""
        key = self._key("decision")
        value = proposal
        for rank, store in enumerate(self._stores[:AUTHORITIES]):
            value = self._call(rank, partial(_propose, store, key, value), self.timeout_s) or value
        return value

    def _call(self, rank: int, action: Callable[[], T], seconds: float) -> T | None:
        """Run one store operation; None, and the rank counts as lost, when it fails or takes too long.

        The store's own timeout does not cover a peer that is stopped rather than dead, so a thread watches.
        """
        if rank in self.lost:
            return None
        result: list[T] = []
        reason: list[str] = []

        def work() -> None:
            try:
                result.append(action())
            except dist.DistStoreError:
                reason.append(f"did not answer within {seconds:.0f} s")
            except Exception:
                reason.append("died")

        if rank == self.rank:
            work()
        else:
            thread = threading.Thread(target=work, daemon=True)
            thread.start()
            thread.join(seconds)
        if result:
            return result[0]
        self.lost[rank] = reason[0] if reason else f"did not answer within {seconds:.0f} s"
        return None


def _propose(store: Store, key: str, value: str) -> str:
    return bytes(store.compare_set(key, "", value)).decode()


def _address() -> str:
    """Address of this host as the others see it: that of the route to the rendezvous host, or GEMOPT_HOST."""
    if named := os.environ.get("GEMOPT_HOST"):
        return named
    target = os.environ.get("MASTER_ADDR", "127.0.0.1")
    try:
        family, kind, _, _, where = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(where)
            return str(probe.getsockname()[0])
    except OSError:
        return socket.gethostname()


def refuse_together(said: Sequence[Mapping[str, Any]]) -> None:
    """Raise the same error on every rank when one rank has one, or when ranks were given different things."""
    errors = {rank: answer["error"] for rank, answer in enumerate(said) if "error" in answer}
    if errors:
        rank, (field, value, limit, hint) = next(iter(errors.items()))
        raise InputError(field, value, limit + ("" if len(errors) == len(said) else f" (rank {rank})"), hint)
    for key in said[0]:
        ranks: dict[str, list[int]] = {}
        for rank, answer in enumerate(said):
            ranks.setdefault(answer[key], []).append(rank)
        if len(ranks) > 1:
            groups = " and ".join(str(group) for group in ranks.values())
            raise InputError(key, f"different ones on ranks {groups}", "the same is needed on every rank")
