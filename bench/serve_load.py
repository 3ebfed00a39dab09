"""What `serve` does under twice the load that it can bear: python -m bench.serve_load MODEL [INDEX] [--seconds=600]

A server of its own is asked for vectors of short texts, in all three modes. First by 64 clients that wait for their
answers: what it then answers a second is what it can bear. Then by clients that come at twice that rate whether it
answers or not, for so many seconds. Beside them others do harm: heads that arrive a byte at a time, bodies that never
come, bodies larger than allowed, said so beforehand and not.

It prints the figures as JSON, and ends with 1 if the server crashed or failed at a request, if its memory (RSS) grew by
more than 5 % from the first tenth of the load to the last, if an accepted request waited longer than the server
promises, if fewer were answered than half of what it can bear, or if harm was not refused. The clients take their share
of the processors: on few, the rate is less than what the server alone could bear.
"""

import asyncio
import contextlib
import dataclasses
import json
import pathlib
import socket
import subprocess
import sys
import time
from collections import Counter

import numpy as np

from r3jax.serving.limits import Limits

CLIENTS, CALIBRATION, DRIP = 64, 15.0, 0.5
MODES = ("query", "query-direct", "document")
GROWTH = 0.05
REFUSED = {408, 413, 503, 0}  # 0: closed while the client still sent


@dataclasses.dataclass
class Load:
    """What came of it. Seconds are of accepted requests, from connecting to the last byte."""

    bearable: float = 0.0  # requests a second
    lasted: float = 0.0  # seconds of the load
    asked: int = 0
    statuses: Counter = dataclasses.field(default_factory=Counter)  # 0: no answer
    seconds: list[float] = dataclasses.field(default_factory=list)
    harm: Counter = dataclasses.field(default_factory=Counter)  # statuses of what does harm
    memory: list[int] = dataclasses.field(default_factory=list)  # KiB, one a second
    alive: bool = True

    @property
    def held(self) -> tuple[float, float]:
        """The memory: the medians of the first and of the last tenth, KiB."""
        tenth = max(1, len(self.memory) // 10)
        return float(np.median(self.memory[:tenth])), float(np.median(self.memory[-tenth:]))

    @property
    def growth(self) -> float:
        """Of the memory, from the first tenth to the last."""
        first, last = self.held
        return last / first - 1

    @property
    def complaints(self) -> list[str]:
        """What should not have been."""
        limits = Limits()
        wrong = [] if self.alive else ["the server is gone"]
        if strange := set(self.statuses) - {200, 429, 503}:
            wrong.append(f"requests were answered with {sorted(strange)}")
        if not self.statuses[503] + self.statuses[429]:
            wrong.append("nothing was refused: this was no overload")
        if self.statuses[200] < self.bearable * self.lasted / 2:
            wrong.append("those who do harm kept the others out")
        if self.growth > GROWTH:
            wrong.append(f"the memory grew by {self.growth:.1%}")
        if self.seconds and np.percentile(self.seconds, 99) > limits.seconds:
            wrong.append(f"the 99th percentile of the answers took longer than {limits.seconds:g} s")
        if set(self.harm) - REFUSED or not self.harm[408] or not self.harm[413]:
            wrong.append(f"what does harm was answered with {sorted(self.harm)}")
        return wrong

    def as_json(self) -> str:
        found = {"bearable_per_second": round(self.bearable, 1), "asked": self.asked}
        found |= {"statuses": dict(sorted(self.statuses.items())), "harm": dict(sorted(self.harm.items()))}
        times = {f"p{p}_s": round(float(np.percentile(self.seconds or [np.nan], p)), 3) for p in (50, 99, 100)}
        first, last = (kib / 1024 for kib in self.held)
        memory = {"rss_first_mib": round(first), "rss_last_mib": round(last), "growth": round(self.growth, 4)}
        return json.dumps(found | times | memory | {"complaints": self.complaints}, indent=1)


def main(argv: list[str]) -> int:
    seconds = [float(word.partition("=")[2]) for word in argv if word.startswith("--seconds=")]
    words = [word for word in argv if not word.startswith("--")]
    command = [sys.executable, "-m", "r3jax.serve", *words, "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            if not (ready := server.stdout.readline().split()):
                return server.wait()  # it has said why
            address = ready[-1]
            found = asyncio.run(measure(address, pathlib.Path(words[0]).resolve().name, server, *seconds))
        finally:
            server.terminate()
    print(found.as_json())
    if server.returncode:
        print(f"the server ended with {server.returncode}", file=sys.stderr)
    return 1 if found.complaints or server.returncode else 0


async def measure(
    address: str, name: str, server: subprocess.Popen, seconds: float = 600.0, calibration: float = CALIBRATION
) -> Load:
    """The load on a server that runs."""
    host, port = address.removeprefix("http://").rsplit(":", 1)
    where = host, int(port)
    load, rng = Load(), np.random.default_rng(0)
    requests = [_request(name, MODES[i % 3], rng) for i in range(300)]

    async def patient(end: float) -> int:
        answered = 0
        while time.monotonic() < end:
            status, _ = await _ask(where, requests[rng.integers(len(requests))])
            answered += status == 200
        return answered

    end = time.monotonic() + calibration
    load.bearable = sum(await asyncio.gather(*(patient(end) for _ in range(CLIENTS)))) / calibration

    async def impatient(request: bytes) -> None:
        status, took = await _ask(where, request)
        load.statuses[status] += 1
        if status == 200:
            load.seconds.append(took)

    begin, load.lasted = time.monotonic(), seconds
    watching = [_harm(where, load, begin + seconds), _watch(server, load, begin + seconds)]
    tasks = [asyncio.create_task(task) for task in watching]
    while (now := time.monotonic() - begin) < seconds:
        while load.asked < 2 * load.bearable * now:
            tasks.append(asyncio.create_task(impatient(requests[load.asked % len(requests)])))
            load.asked += 1
        tasks = [task for task in tasks if not task.done()]
        await asyncio.sleep(0.01)
    await asyncio.gather(*tasks)
    load.alive = server.poll() is None
    return load


def _request(name: str, mode: str, rng: np.random.Generator) -> bytes:
    text = " ".join(rng.choice(["list", "files", "by", "size", "delete", "folder", "show", "disk"], rng.integers(1, 9)))
    return _post("/v1/embeddings", json.dumps({"model": f"{name}:{mode}", "input": text}).encode())


def _post(path: str, body: bytes, length: int | None = None) -> bytes:
    length = len(body) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {length}\r\n\r\n".encode() + body


async def _ask(where: tuple[str, int], sent: bytes) -> tuple[int, float]:
    """The status of an answer, 0 where none came, and the seconds until its end."""
    begin, loop, answer = time.monotonic(), asyncio.get_running_loop(), bytearray()
    with contextlib.suppress(OSError), socket.socket() as connection:
        connection.setblocking(False)
        # Sent in the same breath: a client that is busy between the two would look like one that drips.
        with contextlib.suppress(BlockingIOError):
            connection.connect(where)
        await loop.sock_sendall(connection, sent)
        while data := await loop.sock_recv(connection, 1 << 16):
            answer += data
    return int(answer[9:12] or 0), time.monotonic() - begin


async def _harm(where: tuple[str, int], load: Load, end: float) -> None:
    """Ten heads at a time that arrive too slowly; more bodies that never come than requests are answered at once; and
    bodies that are too large."""
    large, never = Limits().body_bytes + 1, [_post("/search", b"", 99)] * (Limits().requests + 100)
    chunks = b"POST /search HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks += (b"100000\r\n" + b"x" * 0x100000 + b"\r\n") * (large // 0x100000) + b"1\r\nx\r\n"
    while time.monotonic() < end:
        wanted = [_drip(where) for _ in range(10)] + [_ask(where, _post("/search", b"", large)), _ask(where, chunks)]
        wanted += [_ask(where, head) for head in never]
        for status, _ in await asyncio.gather(*wanted):
            load.harm[status] += 1


async def _drip(where: tuple[str, int]) -> tuple[int, float]:
    begin = time.monotonic()
    reader, writer = await asyncio.open_connection(*where)
    answer = asyncio.create_task(reader.read())
    writer.write(b"POST /search HTTP/1.1\r\nX: ")
    while not answer.done():
        writer.write(b"x")
        await asyncio.sleep(DRIP)
    writer.close()
    try:
        return int(answer.result()[9:12] or 0), time.monotonic() - begin
    except OSError:
        return 0, time.monotonic() - begin


async def _watch(server: subprocess.Popen, load: Load, end: float) -> None:
    status = pathlib.Path(f"/proc/{server.pid}/status")
    while time.monotonic() < end and server.poll() is None:
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
        load.memory.append(int(line.split()[1]))
        await asyncio.sleep(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
