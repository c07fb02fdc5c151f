"""Check of the network ports and of the address at which ranks meet."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Iterable

from megadiff.doctor.examination import Finding, Subject, fail, ok, warn

DEFAULT_PORT = 29500
"""Port that torchrun uses on one node if none is given."""

_PATIENCE_S = 3.0
_FREE_ONE = "set MASTER_PORT, or torchrun --master-port, to a free one, or end the process that holds it"


def check(subject: Subject) -> Iterable[Finding]:
    """Check that a port can be bound here, and that MASTER_ADDR, if set, resolves and can be reached."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        yield ok(f"a free port can be bound, such as {probe.getsockname()[1]}")
    address, text = subject.environment.get("MASTER_ADDR"), subject.environment.get("MASTER_PORT")
    if text is not None and not (text.isdecimal() and 0 < int(text) < 65536):
        yield fail(f"MASTER_PORT is {text!r}, wanted a number from 1 to 65535", "set it to a free port")
        return
    port = int(text) if text is not None else DEFAULT_PORT
    if address is None:
        if _is_taken(port):
            tell = fail if text is not None else warn
            yield tell(f"port {port}, where ranks of one node meet, is in use", _FREE_ONE)
        return
    yield _meeting_place(address, port)


def _meeting_place(address: str, port: int) -> Finding:
    where = f"MASTER_ADDR {address}"
    try:
        host = str(socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        return fail(f"{where} does not resolve ({why})", "set it to the first node's name or address")
    if _is_this_node(host):
        if _is_taken(port):
            return fail(f"{where} is this node, and its port {port} is in use", _FREE_ONE)
        return ok(f"{where} is this node, and its port {port} is free")
    try:
        socket.create_connection((host, port), timeout=_PATIENCE_S).close()
    except ConnectionRefusedError:
        return ok(f"{where} ({host}) answers; nothing listens on port {port} yet")
    except OSError as error:
        why = error.strerror or "no answer"
        return fail(f"{where} ({host}), port {port}, cannot be reached ({why})", "check the network and the firewall")
    return warn(f"something listens on {where}, port {port}", "fine if the run has started; otherwise use another port")


def _is_this_node(host: str) -> bool:
    """Return whether an address belongs to this node.

    To one of its own addresses a machine would send a datagram from that same address; none is sent.
    """
    if ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        return True
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:
            return False
        return probe.getsockname()[0] == host


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
        try:
            probe.bind(("", port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False
