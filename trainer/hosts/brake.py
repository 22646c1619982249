"""Slows down who tries passwords: one after the other from each address, and some seconds for a wrong one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

FREE = 5
"""Wrong passwords of an address before its requests wait for each other."""
APART = 1.0
"""Seconds between two tries then, and before a wrong password is answered."""
MOST_WAITING = 10
"""Tries of one address that may wait; further ones are refused without a look at them."""
FORGOTTEN = 60.0
"""Seconds without a wrong password after which an address begins anew."""
MOST_ADDRESSES = 4096


@dataclass
class _Tries:
    wrong: int = 0
    last: float = 0.0
    next: float = 0.0
    waiting: int = 0


class Brake:
    """Counts wrong passwords by address. `clock` and `sleep` are in seconds; used in one event loop."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._clock, self._sleep = clock, sleep
        self._tries: dict[str, _Tries] = {}

    async def turn(self, address: str) -> bool:
        """Wait until a password of this address may be looked at; false when too many wait already."""
        tries = self._tries.get(address)
        now = self._clock()
        if tries is None or now - tries.last > FORGOTTEN or tries.wrong < FREE:
            return True
        if tries.waiting >= MOST_WAITING:
            return False
        tries.next = max(tries.next, now) + APART
        tries.waiting += 1
        try:
            await self._sleep(tries.next - now)
        finally:
            tries.waiting -= 1
        return True

    def right(self, address: str) -> None:
        """The right password came from this address."""
        self._tries.pop(address, None)

    async def wrong(self, address: str) -> None:
        """A wrong password came from this address: wait before that is said."""
        now = self._clock()
        tries = self._tries.get(address)
        if tries is None or now - tries.last > FORGOTTEN:
            tries = _Tries()
        self._tries.pop(address, None)  # so that the last ones stand at the end
        self._tries[address] = tries
        if len(self._tries) > MOST_ADDRESSES:
            del self._tries[next(iter(self._tries))]
        tries.wrong, tries.last = tries.wrong + 1, now
        await self._sleep(APART)
