"""
A connection pooler in transaction mode, as far as one matters to its clients.

It lends a client another server connection for each transaction, makes up the
process ids that it tells, and refuses startup parameters that it does not
know. What a session was told (named statements, settings) is therefore gone,
or somebody else's, in the next transaction.

The protocol: https://www.postgresql.org/docs/current/protocol-message-formats.html
"""

import asyncio
import struct
import threading
from typing import NamedTuple

_SSL_REQUEST, _GSS_REQUEST = 80877103, 80877104
_KNOWN = {"user", "database", "application_name", "client_encoding"}


class Message(NamedTuple):
    kind: bytes
    body: bytes

    def __bytes__(self) -> bytes:
        return self.kind + struct.pack("!i", len(self.body) + 4) + self.body


async def _read(reader: asyncio.StreamReader) -> Message:
    kind = await reader.readexactly(1)
    (size,) = struct.unpack("!i", await reader.readexactly(4))
    return Message(kind, await reader.readexactly(size - 4))


class Server:
    """One connection to Postgres, and what it said of itself when it began."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.greeting = b""

    @classmethod
    async def open(cls, path: str, database: str) -> "Server":
        server = cls(*await asyncio.open_unix_connection(path))
        asked = b"user\0postgres\0database\0" + database.encode() + b"\0\0"
        server.writer.write(struct.pack("!ii", len(asked) + 8, 196608) + asked)
        while (message := await _read(server.reader)).kind != b"Z":
            server.greeting += bytes(message) if message.kind in (b"R", b"S") else b""
        return server


class TransactionPooler:
    """
    Listens on `port`; every client shares `size` server connections.

    Attributes:
        transactions: How many were passed on so far.
    """

    def __init__(self, path: str, database: str, size: int = 2) -> None:
        self.transactions = 0
        self._path, self._database, self._size = path, database, size
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(started)), daemon=True)
        self._thread.start()
        started.wait()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()

    async def _run(self, started: threading.Event) -> None:
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        servers = [await Server.open(self._path, self._database) for _ in range(self._size)]
        # First in, first out: a client hardly ever gets the same one twice.
        self._idle: asyncio.Queue[Server] = asyncio.Queue()
        for server in servers:
            self._idle.put_nowait(server)
        listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = listener.sockets[0].getsockname()[1]
        started.set()
        await self._ended.wait()
        listener.close()
        for server in servers:
            server.writer.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if await self._greet(reader, writer):
                await _Client(self, self._idle, reader, writer).run()
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.close()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        while True:
            size, code = struct.unpack("!ii", await reader.readexactly(8))
            asked = await reader.readexactly(size - 8)
            if code not in (_SSL_REQUEST, _GSS_REQUEST):
                break
            writer.write(b"N")
        names = {name.decode() for name in asked.split(b"\0")[::2] if name}
        if not names <= _KNOWN:
            told = b"SFATAL\0C08P01\0Munsupported startup parameter\0\0"
            writer.write(bytes(Message(b"E", told)))
            return False
        server = await self._idle.get()
        self._idle.put_nowait(server)
        key = Message(b"K", struct.pack("!ii", 1, 1))
        writer.write(server.greeting + bytes(key) + bytes(Message(b"Z", b"I")))
        return True


class _Client:
    def __init__(
        self,
        pooler: TransactionPooler,
        idle: "asyncio.Queue[Server]",
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._pooler = pooler
        self._idle = idle
        self._reader = reader
        self._writer = writer
        self._server: Server | None = None
        self._answers: asyncio.Task[None] | None = None
        self._syncs = 0
        self._is_unsynced = False

    async def run(self) -> None:
        while (message := await _read(self._reader)).kind != b"X":
            if self._server is None:
                self._server = await self._idle.get()
                self._answers = asyncio.create_task(self._pass_answers(self._server))
            if message.kind != b"H":  # asks to send what is there, and begins nothing
                self._is_unsynced = message.kind not in (b"S", b"Q")
                self._syncs += not self._is_unsynced
            self._server.writer.write(bytes(message))

    async def _pass_answers(self, server: Server) -> None:
        while True:
            message = await _read(server.reader)
            self._writer.write(bytes(message))
            if message.kind != b"Z":
                continue
            self._syncs -= 1
            if message.body == b"I" and not self._syncs and not self._is_unsynced:
                self._pooler.transactions += 1
                self._server = None
                self._idle.put_nowait(server)
                return
