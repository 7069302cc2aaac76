"""One host copy for all processes that a launcher has started on this machine.

Responsibility: finding the group, and handing the first process's memory to the others. Knows nothing of models.

The first local rank says how the layers are kept, fills the memory, and sends its file descriptor through an abstract
UNIX socket (unix(7), SCM_RIGHTS); there is no file, no /dev/shm and no process group. The memory goes when the last
process that maps it goes. A rank that waits is connected: it learns at once when the first one has died, and looks
every few minutes whether it still works.

Such a socket has no permissions, so both sides ask the kernel who the other one is: another user gets nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import struct
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CONNECT_TIMEOUT_S = 600.0
"""Longest wait for the first rank to begin with the same model; importing and building may take it minutes."""

STALL_TIMEOUT_S = 600.0
"""After so long a wait, a first rank that has hardly used a processor meanwhile is taken to hang."""

_MIN_WORK_S = 1.0
"""Processor time that loading takes in that time at the very least; what sleeping threads take is far less."""

EXIT_WAIT_S = 30.0
"""Longest wait of a first rank that ends for those that have not come yet."""

_RETRY_S = 0.05
_MAX_MESSAGE_BYTES = 65536
_num_offers: Counter[str] = Counter()


@dataclass(frozen=True, kw_only=True)
class LocalGroup:
    """The processes of one launch on this machine.

    Attributes:
        rank: Of this process on this machine.
        size: How many there are on this machine.
        host: Number of the machine in the launch. Two that share a network namespace, containers say, share the names
            of its sockets too.
    """

    rank: int
    size: int
    host: int = 0

    @classmethod
    def find(cls) -> LocalGroup | None:
        """From what torchrun and ``accelerate launch`` put into the environment; None for a process alone."""
        rank, size = os.environ.get("LOCAL_RANK"), os.environ.get("LOCAL_WORLD_SIZE")
        if rank is None or size is None:
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                warnings.warn(
                    "WORLD_SIZE says that there are several processes, but LOCAL_RANK or LOCAL_WORLD_SIZE is not set: "
                    "those of this machine do not find each other, and each keeps its own copy of the layers in RAM. "
                    "torchrun and accelerate launch set them",
                    stacklevel=3,
                )
            return None
        if int(size) < 2:
            return None
        return cls(rank=int(rank), size=int(size), host=int(os.environ.get("GROUP_RANK", "0")))

    def address(self, identity: str) -> bytes:
        """Name of the socket on which the first rank offers something, another one each time."""
        count = _num_offers[identity]
        _num_offers[identity] += 1
        # All ranks of one launch have the same parent and the same master port.
        launch = f"{os.getuid()}-{os.getppid()}-{os.environ.get('MASTER_PORT', '')}-{self.host}"
        return f"\0hf_lema-{launch}-{identity}-{count}".encode()


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What the first rank has decided.

    Attributes:
        tier: ``"ram"`` or ``"disk"``.
        descriptor: Of the filled memory; None for the disk tier. Whoever has the offer owns it.
    """

    tier: str
    descriptor: int | None = None


class OfferServer:
    """The first rank's side: begins before the memory is filled, so that the others wait connected.

    Args:
        group: The group; this process is its rank 0.
        identity: Of what is offered; the others must ask for the same.

    Raises:
        RuntimeError: Another process has the address: two launches that cannot be told apart.
    """

    def __init__(self, group: LocalGroup, identity: str) -> None:
        self._num_others = group.size - 1
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.bind(group.address(identity))
        except OSError as error:
            self._socket.close()
            raise RuntimeError(f"another process offers the same memory to its local ranks already: {error}") from error
        self._socket.listen(group.size)

    def answer(self, offer: Offer) -> threading.Thread:
        """Gives the offer to all others, as they come, in a thread that ends with the last of them."""
        message = json.dumps({"tier": offer.tier}).encode()
        thread = threading.Thread(
            target=self._serve, args=(message, offer.descriptor), name="hf_lema-offer", daemon=True
        )
        thread.start()
        # A first rank that is done at once must not leave before the others have what it offers.
        atexit.register(thread.join, EXIT_WAIT_S)
        return thread

    def refuse(self, error: BaseException) -> None:
        """Tells those who wait that there will be nothing, and why."""
        text = f"{type(error).__name__}: {error}"[: _MAX_MESSAGE_BYTES // 8]
        self._socket.settimeout(1.0)  # those who are not there yet are ended by the launcher
        self._send_all(json.dumps({"error": text}).encode(), None)

    def _serve(self, message: bytes, descriptor: int | None) -> None:
        self._socket.settimeout(CONNECT_TIMEOUT_S)
        try:
            self._send_all(message, descriptor)
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def _send_all(self, message: bytes, descriptor: int | None) -> None:
        num_left = self._num_others
        with self._socket, contextlib.suppress(TimeoutError):
            while num_left:
                connection, _ = self._socket.accept()
                with connection, contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    if _peer_of(connection)[1] != os.getuid():
                        continue
                    num_left -= 1  # also one that has died meanwhile
                    socket.send_fds(connection, [message], [] if descriptor is None else [descriptor])


def receive_offer(group: LocalGroup, identity: str, timeout_s: float = CONNECT_TIMEOUT_S) -> Offer:
    """The other ranks' side: waits until the first has filled the memory.

    Args:
        group: The group; this process is not its rank 0.
        identity: Of what is asked for.
        timeout_s: Longest wait for the first rank to begin; once it has, the wait lasts as long as it lives and works.

    Raises:
        RuntimeError: The first rank did not come in time, died, hangs, or failed (its error is in the message); or the
            one that answers is another user's.
    """
    address = group.address(identity)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        _connect(connection, address, timeout_s, group)
        pid, user = _peer_of(connection)
        if user != os.getuid():
            raise RuntimeError(f"the socket of local rank 0 belongs to user {user}, not to {os.getuid()}: not trusted")
        message, descriptors = _receive(connection, pid)
    if not message:
        raise RuntimeError("local rank 0 ended before it had loaded the model; its own error says why")
    said = json.loads(message)
    if "error" in said:
        raise RuntimeError(f"local rank 0 could not load the model: {said['error']}")
    return Offer(tier=said["tier"], descriptor=descriptors[0] if descriptors else None)


def _receive(connection: socket.socket, pid: int) -> tuple[bytes, list[int]]:
    """Waits for the offer as long as the first rank lives and works; empty where it has died."""
    connection.settimeout(STALL_TIMEOUT_S)
    worked_s = _processor_s(pid)
    while True:
        try:
            message, descriptors, _, _ = socket.recv_fds(connection, _MAX_MESSAGE_BYTES, 1)
            return message, descriptors
        except ConnectionResetError:  # noqa: PERF203 - comes by once in minutes
            return b"", []
        except TimeoutError as error:
            before_s, worked_s = worked_s, _processor_s(pid)
            if worked_s - before_s < _MIN_WORK_S:
                raise RuntimeError(
                    f"local rank 0 (process {pid}) has used a processor for less than {_MIN_WORK_S:g} s in "
                    f"{STALL_TIMEOUT_S:.0f} s while this rank waited for it to load the model: it hangs, perhaps in a "
                    "read from a disk that does not answer"
                ) from error


def _processor_s(pid: int) -> float:
    """Processor time of a process (utime and stime of proc(5)); the clock, which goes on, where it cannot be seen."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return time.monotonic()
    return sum(map(int, stat.rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")


def _peer_of(connection: socket.socket) -> tuple[int, int]:
    """(process, user) at the other end, by SO_PEERCRED of unix(7)."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, user, _ = struct.unpack("3i", credentials)
    return pid, user


def _connect(connection: socket.socket, address: bytes, timeout_s: float, group: LocalGroup) -> None:
    deadline_s = time.monotonic() + timeout_s
    while connection.connect_ex(address) != 0:
        if time.monotonic() > deadline_s:
            raise RuntimeError(
                f"local rank {group.rank} waited {timeout_s:.0f} s for local rank 0 to load the same model. All ranks "
                "must build the same model, in the same order and with the same arguments"
            )
        time.sleep(_RETRY_S)  # noqa: TID251 - until another process binds the name there is nothing to wait on


def share(identity: str, make: Callable[[], Offer], accept: Callable[[Offer], None], group: LocalGroup) -> None:
    """Has the first rank make something and all others accept it.

    Args:
        identity: The same on all ranks for the same thing.
        make: Run on local rank 0: decides, fills the memory.
        accept: Run on the others.
        group: The group.
    """
    if group.rank > 0:
        accept(receive_offer(group, identity))
        return
    server = OfferServer(group, identity)
    try:
        offer = make()
    except BaseException as error:
        server.refuse(error)
        raise
    server.answer(offer)
