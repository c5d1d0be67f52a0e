"""Says so where nothing moves."""

import asyncio
import time
from collections.abc import Callable

from screen import say


class Watch:
    """Notes what happens, and says what is awaited where something has not happened for a while.

    Args:
        seconds: how long a while is; while nothing happens, it is said again after twice as long, and so on.
        awaited: gives what is awaited, in a line.
        events: what happens, as in "no <event> for 120 s".
    """

    def __init__(self, seconds: float, awaited: Callable[[], str], *events: str):
        self.seconds, self.awaited = seconds, awaited
        self.last = dict.fromkeys(events, time.monotonic())

    def saw(self, event: str) -> None:
        """It has happened."""
        self.last[event] = time.monotonic()

    async def run(self) -> None:
        """Watch, until cancelled."""
        self.last = dict.fromkeys(self.last, time.monotonic())
        patience = dict.fromkeys(self.last, self.seconds)
        while True:
            await asyncio.sleep(self.seconds / 20)
            for event, last in self.last.items():
                silent = time.monotonic() - last
                if silent < self.seconds:
                    patience[event] = self.seconds
                elif silent >= patience[event]:
                    patience[event] = 2 * silent
                    say(f"no {event} for {silent:.0f} s: {self.awaited()}")
