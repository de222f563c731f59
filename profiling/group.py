"""The ranks that measure: rank 0 asks, all answer; a rank that dies is named by the others.

Only the key-value store of torchrun is used, so nothing can hang inside a collective, and the accelerators are left
to what is measured. Every rank counts up a sign of life; one that stops doing so is dead.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib import import_module
from itertools import count
from typing import Any

from gemopt.exceptions import GemoptError, InputError

START_S = 300.0  # a slow rank may still be importing its libraries
SLICE_S = 0.5  # time between two looks for dead ranks
SAME_S = 2.0  # how much later rank 0 may meet an error that all ranks meet
LONGEST_PAUSE_S = 0.02  # between two looks for an answer: how far apart ranks may start on a load


class RankLostError(GemoptError, RuntimeError):
    """A rank died, failed or does not answer; the message names it. `told`: by that rank, or by rank 0."""

    def __init__(self, message: str, *, told: bool = False) -> None:
        super().__init__(message)
        self.told = told


class _TerminatedError(BaseException):
    """SIGTERM: torchrun ends the other ranks when one is lost."""


class Group:
    """This rank among `size` ranks. With one rank nothing is started and nothing waited for.

    A process may make several, one after the other, if all ranks do.
    """

    _made = count()

    def __init__(self, *, timeout_s: float = 10.0, answer_s: float = 600.0) -> None:
        self.rank = _environment("RANK", 0)
        self.size = _environment("WORLD_SIZE", 1)
        self.local_rank = _environment("LOCAL_RANK", 0)
        self.timeout_s, self.answer_s = timeout_s, answer_s
        self._sent = 0
        self._stop = threading.Event()
        self._seen: dict[int, tuple[str, float]] = {}
        self._number = next(Group._made)
        if self.size > 1:
            self._store = self._connect(master=self.rank == 0)
            threading.Thread(target=self._beat, args=(self._connect(master=False),), daemon=True).start()

    @property
    def beat_s(self) -> float:
        """Time between two signs of life."""
        return min(1.0, self.timeout_s / 5)

    def _connect(self, *, master: bool) -> Any:
        distributed: Any = import_module("torch.distributed")
        try:
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        except (KeyError, ValueError):
            raise InputError(
                "MASTER_ADDR, MASTER_PORT", "nothing", "several ranks need them", "start with torchrun"
            ) from None
        # torchrun keeps the store in its agent, so that it outlives rank 0.
        master = master and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        store = distributed.TCPStore(host, port, None, master, timeout=timedelta(seconds=60), wait_for_workers=False)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return distributed.PrefixStore(f"gemopt-profile/{attempt}/{self._number}", store)

    def _beat(self, store: Any) -> None:
        beats = 0
        while not self._stop.is_set():
            beats += 1
            with suppress(Exception):  # the store is gone when everything ends
                store.set(f"beat/{self.rank}", f"{beats} {socket.gethostname()} {os.getpid()}")
            self._stop.wait(self.beat_s)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Tell the others when this rank fails; turn being ended because of another rank into its name.

        What all ranks meet alike is for rank 0 to say, and what one rank meets for that rank.
        """
        if self.size == 1:
            yield
            return
        before = signal.signal(signal.SIGTERM, _terminated)
        try:
            yield
        except _TerminatedError:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self._store.set(f"leaving/{self.rank}", "ended")
            raise self._name_the_dead() from None
        except RankLostError:
            self._store.set(f"leaving/{self.rank}", "ended")
            raise
        except BaseException as error:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            reason = " ".join(str(error).split()) or type(error).__name__
            self._store.set(f"failed/{self.rank}", reason)
            if isinstance(error, GemoptError):
                error.told = self.rank > 0 and self._said_by_the_first(reason)
            raise
        finally:
            self._stop.set()
            signal.signal(signal.SIGTERM, before)

    def _said_by_the_first(self, reason: str) -> bool:
        end = time.monotonic() + SAME_S
        with suppress(RuntimeError):  # the store is gone
            while time.monotonic() < end:
                if self._store.check(["failed/0"]):
                    return bool(self._store.get("failed/0").decode() == reason)
                time.sleep(LONGEST_PAUSE_S)
        return False

    def ask(self, question: Any, answer: Callable[[Any], Any]) -> list[Any]:
        """Rank 0: put a question to all ranks and collect their answers, this rank's own from `answer`."""
        if self.size == 1:
            return [answer(question)]
        number = self._sent
        self._sent += 1
        self._store.set(f"question/{number}", json.dumps(question))
        own = answer(question)
        others = [json.loads(self._wait(f"answer/{number}/{rank}", rank)) for rank in range(1, self.size)]
        return [own, *others]

    def serve(self, answer: Callable[[Any], Any]) -> None:
        """Other ranks: answer until rank 0 asks nothing more."""
        while True:
            number = self._sent
            self._sent += 1
            question = json.loads(self._wait(f"question/{number}", 0))
            if question is None:
                return
            self._store.set(f"answer/{number}/{self.rank}", json.dumps(answer(question)))

    def dismiss(self) -> None:
        """Rank 0: everything is done, also on disk."""
        if self.size > 1:
            self._store.set(f"question/{self._sent}", "null")

    def _wait(self, key: str, whose: int) -> str:
        # The store's own wait warns on standard error at every timeout, so it is asked again and again.
        end, looked, pause = time.monotonic() + self.answer_s, time.monotonic(), 0.001
        while True:
            try:
                if self._store.check([key]):
                    return self._store.get(key).decode()  # type: ignore[no-any-return]
                dead = None
                if time.monotonic() - looked > SLICE_S:
                    dead, looked = self._dead(), time.monotonic()
            except RuntimeError as error:
                raise RankLostError(f"the store of the ranks is gone: {str(error).splitlines()[0]}") from None
            if dead is not None:
                raise dead
            if time.monotonic() > end:
                raise RankLostError(f"rank {whose} has not answered for {self.answer_s:.0f} s; nothing was written")
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE_S)

    def _dead(self) -> RankLostError | None:
        """What happened to the first rank that failed or is silent, None while all live."""
        now = time.monotonic()
        for rank in range(self.size):
            if rank == self.rank:
                continue
            if self._store.check([f"failed/{rank}"]):
                reason = self._store.get(f"failed/{rank}").decode()
                return RankLostError(f"rank {rank} failed: {reason}; nothing was written", told=True)
            if self._store.check([f"leaving/{rank}"]):
                continue
            beat = self._store.get(f"beat/{rank}").decode() if self._store.check([f"beat/{rank}"]) else ""
            before, since = self._seen.setdefault(rank, (beat, now))
            if beat != before:
                self._seen[rank] = (beat, now)
            elif beat and now - since > self.timeout_s:
                _, host, process = beat.split()
                died = f"rank {rank} ({host}, process {process}) died while measuring; nothing was written"
                return RankLostError(died, told=0 not in (rank, self.rank))
            elif not beat and now - since > START_S:
                late = f"rank {rank} has not started within {START_S:.0f} s; nothing was written"
                return RankLostError(late, told=0 not in (rank, self.rank))
        return None

    def _name_the_dead(self) -> RankLostError:
        """After SIGTERM: look for a silent rank; torchrun waits 30 s before it kills."""
        self.timeout_s = 3 * self.beat_s
        self._seen.clear()
        end = time.monotonic() + 3 * self.timeout_s
        while time.monotonic() < end:
            with suppress(Exception):
                dead = self._dead()
                if dead is not None:
                    return dead
            time.sleep(self.beat_s / 2)
        return RankLostError("ended from outside (SIGTERM); nothing was written")


def _terminated(number: int, frame: Any) -> None:
    raise _TerminatedError


def _environment(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdigit():
        raise InputError(name, value, "a number >= 0", "start with torchrun, or unset it")
    return int(value)
