"""How many rows a shared call should have at most, found from the calls themselves."""

from timetuner_core.sampling.batch_size import MIN_GAIN

CALLS_AT_EACH_LIMIT = 5  # The fastest of so many calls counts, as other processes can only slow a call down.
FULL = 0.75  # A call with this share of the limit's rows, or more, tells something of the limit.


class BatchLimit:
    """The most rows of a call. It doubles for as long as twice the rows make `MIN_GAIN` times as many rows per second.

    A call that is slow, or that memory does not hold, ends the search at the limit before.

    Args:
        rows: the limit to begin with. largest: the last limit to try.
        max_seconds: a call that takes longer is too slow for those that wait for it.

    Attributes:
        rows: the limit at present.
        is_found: whether it stays as it is.
    """

    def __init__(self, rows: int, largest: int, max_seconds: float) -> None:
        self.rows, self._largest, self._max_seconds = rows, largest, max_seconds
        self._proved, self._proved_rate = rows, 0.0
        self._rates: list[float] = []
        self.is_found = 2 * rows > largest

    def would_learn(self, rows: int) -> bool:
        """Whether the time of a call of so many rows tells something."""
        return not self.is_found and rows >= FULL * self.rows

    def note(self, rows: int, seconds: float) -> None:
        """Learn from a call that gave an answer after so many seconds."""
        if not self.would_learn(rows):
            return
        if self.rows > self._proved and seconds > self._max_seconds:
            self.give_up()
            return
        self._rates.append(rows / seconds)
        if len(self._rates) < CALLS_AT_EACH_LIMIT:
            return
        rate, self._rates = max(self._rates), []
        if rate < MIN_GAIN * self._proved_rate:
            self.give_up()
            return
        self._proved, self._proved_rate = self.rows, rate
        is_slow = self.rows / rate > self._max_seconds
        if is_slow or 2 * self.rows > self._largest:
            self.is_found = True
        else:
            self.rows *= 2

    def give_up(self) -> None:
        """Go back to the last limit that paid, and stay there."""
        self.rows, self.is_found = self._proved, True
