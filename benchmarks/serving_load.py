"""Load over HTTP/1.1, light enough to share two cores with what it measures: about 0.1 ms of processor per request.

Requests are bytes made by hand and connections are kept, so that the client's own library is not what is measured.
`closed_loop` keeps so many clients busy, each sending its next request when the last is answered; `overload` sends at a
rate, whatever comes back, and looks on when it is over.
"""

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

LONGEST_SECONDS = 180.0  # One answer may take so long.
ONE_RETRIED_OF = 100  # rejected requests: it is sent again, once, after its Retry-After
RETRIED_AFTER_LOAD = 10  # the last rejected requests, sent again after their Retry-After, when the load is over
PROBES, PROBE_SECONDS = 20, 0.5  # single requests from the load's end, and the time between them


@dataclass(frozen=True)
class Answer:
    """An answer; `status` is 0 if nothing did. `due` is when it ought to have been sent, of `time.monotonic()`;
    `seconds` count from then, so that a sender who is late (by `late` seconds) flatters nobody."""

    due: float
    late: float
    seconds: float
    status: int
    retry_after: float | None

    @property
    def is_accepted(self) -> bool:
        return self.status == 200

    @property
    def came(self) -> float:
        return self.due + self.seconds

    @property
    def may_return(self) -> float:
        """When it may be sent again, by its Retry-After; never, without one."""
        return self.came + (float("inf") if self.retry_after is None else self.retry_after)


@dataclass
class Target:
    """A request and its address.

    In the JSON of `body`, "$seed", and $number within a text, are replaced by a number that no other request has, since
    a request that was sent before would be answered from a cache; "$label" by a digit; and "$choice" by one of
    `choices` after the other. So is $choice in `path`.
    """

    port: int
    path: str
    body: str
    accept: str = "application/x-npy"
    choices: Sequence[int] = (0,)
    counter: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    idle: list["Connection"] = field(default_factory=list)

    def next_request(self) -> bytes:
        seed = next(self.counter)
        body = self.body.replace('"$seed"', str(seed)).replace('"$label"', str(seed % 10))
        body = body.replace("$number", str(seed))
        choice = str(self.choices[seed % len(self.choices)])
        body, path = body.replace('"$choice"', choice), self.path.replace("$choice", choice)
        return (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nAccept: {self.accept}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
        ).encode()

    async def ask(self, due: float | None = None) -> Answer:
        """One request, now or at `due`, on an idle connection or a new one."""
        due = time.monotonic() if due is None else due
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        late = time.monotonic() - due
        status, retry_after = 0, None
        try:
            async with asyncio.timeout(LONGEST_SECONDS), self._connection() as connection:
                status, headers = await connection.exchange(self.next_request())
            retry_after = float(headers[b"retry-after"]) if b"retry-after" in headers else None
        except (OSError, EOFError, TimeoutError):
            pass
        return Answer(due, late, time.monotonic() - due, status, retry_after)

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator["Connection"]:
        while self.idle and self.idle[-1].is_closed:
            self.idle.pop().writer.close()
        if self.idle:
            connection = self.idle.pop()
        else:
            connection = Connection(*await asyncio.open_connection("127.0.0.1", self.port))
        try:
            yield connection
        except BaseException:
            connection.writer.close()
            raise
        self.idle.append(connection)

    def close(self) -> None:
        """Connections belong to one event loop: call it in there, at its end."""
        for connection in self.idle:
            connection.writer.close()
        self.idle.clear()


@dataclass
class Connection:
    """One kept connection, for one request at a time."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @property
    def is_closed(self) -> bool:
        return self.reader.at_eof() or self.writer.is_closing()

    async def exchange(self, request: bytes) -> tuple[int, dict[bytes, bytes]]:
        """Send, and read the whole answer: its status and headers, by names in lower case."""
        self.writer.write(request)
        first, *lines = (await self.reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
        headers = dict(line.lower().split(b": ", 1) for line in lines if line)
        if headers.get(b"transfer-encoding") == b"chunked":
            while size := int((await self.reader.readuntil(b"\r\n")).split(b";")[0], 16):
                await self.reader.readexactly(size + 2)
            await self.reader.readuntil(b"\r\n")
        else:
            await self.reader.readexactly(int(headers[b"content-length"]))
        if headers.get(b"connection") == b"close":
            self.writer.close()
        return int(first.split(b" ", 2)[1]), headers


@dataclass(frozen=True)
class Load:
    """The answers within `seconds`, and what sending cost."""

    answers: list[Answer]
    seconds: float
    cpu_seconds: float = 0.0

    @property
    def latencies(self) -> list[float]:
        """Latencies of accepted requests, in milliseconds."""
        return [1000 * answer.seconds for answer in self.answers if answer.is_accepted]

    @property
    def rate(self) -> float:
        """Accepted requests per second."""
        return len(self.latencies) / self.seconds

    @property
    def others(self) -> int:
        """How many were not accepted."""
        return len(self.answers) - len(self.latencies)


async def closed_loop(target: Target, clients: int, seconds: float, warm_up: float) -> Load:
    """The answers that come within `seconds` to so many clients; before, each has had one, and `warm_up` is over."""
    await asyncio.gather(*(target.ask() for _ in range(clients)))
    begins = time.monotonic() + warm_up
    ends = begins + seconds
    cpu_seconds = time.process_time()
    answers: list[Answer] = []

    async def client() -> None:
        while time.monotonic() < ends:
            answers.append(await target.ask())

    await asyncio.gather(*(client() for _ in range(clients)))
    target.close()
    counted = [answer for answer in answers if begins <= answer.came <= ends]
    return Load(counted, seconds, (time.process_time() - cpu_seconds) * len(counted) / max(1, len(answers)))


async def one_by_one(target: Target, requests: int, between: Callable[[], object] = lambda: None) -> Load:
    """Send so many requests, each after the last one's answer, with `between` called after each."""
    begins = time.monotonic()
    answers = []
    for _ in range(requests):
        answers.append(await target.ask())
        between()
    target.close()
    return Load(answers, time.monotonic() - begins)


@dataclass(frozen=True)
class Overload:
    """Tell what became of the requests sent at a rate, of some of those rejected when they came again, of the last ones
    rejected when they came again after the load, and of single requests from the load's end."""

    load: Load
    retries: list[Answer]
    retries_after_load: list[Answer]
    probes: list[Answer]
    ends: float


async def open_loop(target: Target, rate: float, seconds: float, warm_up: float) -> Load:
    """The answers to requests sent at a mean rate, at random times (a Poisson process), `warm_up` not counted."""
    arrivals = random.Random(0)
    due = time.monotonic()
    begins, ends = due + warm_up, due + warm_up + seconds
    tasks = []
    while (due := due + arrivals.expovariate(rate)) < ends:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        tasks.append(asyncio.create_task(target.ask(due)))
    answers = await asyncio.gather(*tasks)
    target.close()
    return Load([answer for answer in answers if answer.due >= begins], seconds)


async def overload(target: Target, rate: float, seconds: float) -> Overload:
    """Send at a mean rate, at random times (a Poisson process), for so long; then single requests."""
    arrivals = random.Random(0)
    cpu_seconds = time.process_time()
    due = time.monotonic()
    ends = due + seconds
    answers: list[Answer] = []
    rejected: list[Answer] = []
    tasks: list[asyncio.Task[None]] = []
    retries: list[asyncio.Task[Answer]] = []

    async def one(due: float) -> None:
        answer = await target.ask(due)
        answers.append(answer)
        if answer.status == 429:
            rejected.append(answer)
            if len(rejected) % ONE_RETRIED_OF == 0 and answer.may_return < ends:
                retries.append(asyncio.create_task(target.ask(answer.may_return)))

    while (due := due + arrivals.expovariate(rate)) < ends:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        tasks.append(asyncio.create_task(one(due)))
    await asyncio.sleep(max(0.0, ends - time.monotonic()))
    cpu_seconds = time.process_time() - cpu_seconds
    returning = [answer.may_return for answer in rejected[-RETRIED_AFTER_LOAD:] if answer.may_return < float("inf")]
    later = [target.ask(due) for due in (*returning, *(ends + PROBE_SECONDS * k for k in range(PROBES)))]
    results = await asyncio.gather(*later)
    await asyncio.gather(*tasks)
    retried = await asyncio.gather(*retries)
    target.close()
    load = Load(answers, seconds, cpu_seconds)
    return Overload(load, retried, results[: len(returning)], results[len(returning) :], ends)
