"""Checks of this machine: each function `check_...` is one, and yields findings; none if nothing is to be examined."""

from __future__ import annotations

import errno
import importlib.util
import ipaddress
import multiprocessing
import os
import queue
import re
import resource
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadiff.doctor.examination import Finding, Subject, fail, ok, warn
from megadiff.platform import megatron_versions

if TYPE_CHECKING:
    from megadiff.platform.machine import Platform

_ADVICE_ON_CPU = "see that the host's name resolves (/etc/hosts), or name a network interface in GLOO_SOCKET_IFNAME"
_ADVICE_ON_GPU = "run again with NCCL_DEBUG=INFO; see that torch's build fits the driver, or name NCCL_SOCKET_IFNAME"
_ALL_REDUCE_S = 40.0


def check_backend(subject: Subject) -> Iterable[Finding]:
    """Check gloo always, and NCCL if there are GPUs."""
    from megadiff.platform.machine import detect

    yield _tried(detect("cpu"), 2)
    if not subject.platform.is_cpu:
        yield _tried(subject.platform, min(2, subject.platform.local_devices()))


def _tried(platform: Platform, ranks: int) -> Finding:
    try:
        seconds = try_all_reduce(platform, ranks)
    except RuntimeError as error:
        message = f"{platform.backend}: an all-reduce over {ranks} rank(s) failed: {error}"
        return fail(message, _ADVICE_ON_CPU if platform.is_cpu else _ADVICE_ON_GPU)
    return ok(
        f"{platform.backend}: an all-reduce over {ranks} rank(s) of this node took {seconds:.1f} s with its start"
    )


def try_all_reduce(platform: Platform, ranks: int) -> float:
    """Open a group of `ranks` processes of this node and sum over it; return the seconds that took.

    On CPU the processes are forked, which is fast; a forked process cannot use a GPU, so there they are spawned.

    Raises:
        RuntimeError: a rank failed or did not finish in time; the text is the message of the first one that failed.
    """
    context: Any = multiprocessing.get_context("fork" if platform.is_cpu else "spawn")
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        answers = context.Queue()
        group = [
            context.Process(
                target=_summing_rank, args=(platform.kind, rank, ranks, f"file://{folder}/store", answers), daemon=True
            )
            for rank in range(ranks)
        ]
        for process in group:
            process.start()
        try:
            for _ in group:
                complaint = _first_answer(answers, group, start + _ALL_REDUCE_S)
                if complaint:
                    raise RuntimeError(complaint)
        finally:
            for process in group:
                process.kill()
                process.join(5)
    return time.monotonic() - start


def _first_answer(answers: Any, group: list[Any], end: float) -> str:
    while time.monotonic() < end:
        try:
            return answers.get(timeout=0.2)
        except queue.Empty:
            dead = [process.exitcode for process in group if process.exitcode]
            if dead:
                return f"a rank died with exit code {dead[0]}"
    return f"no answer in {_ALL_REDUCE_S:.0f} s"


def _summing_rank(kind: Any, rank: int, ranks: int, store: str, answers: Any) -> None:
    """Join the group and put "" into the queue if the sum is right, otherwise a description of the error."""
    import torch
    from torch import distributed

    from megadiff.platform.machine import detect

    os.environ["LOCAL_RANK"] = str(rank)
    try:
        torch.set_num_threads(1)
        machine = detect(kind)
        distributed.init_process_group(machine.backend, init_method=store, rank=rank, world_size=ranks)
        value = torch.tensor([rank + 1.0], device=machine.device)
        distributed.all_reduce(value)
        wanted = ranks * (ranks + 1) / 2
        answers.put("" if value.item() == wanted else f"the sum is {value.item()} instead of {wanted}")
        distributed.destroy_process_group()
    except Exception as error:
        lines = str(error).strip().splitlines()
        answers.put(f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}")


_TOLERATED_S = 5.0


def check_clock(subject: Subject) -> Iterable[Finding]:
    """Compare the time of a new file with the clock.

    Yields nothing if no file can be created, because the check of the disk reports that.
    """
    folder = subject.existing_folder
    try:
        with tempfile.NamedTemporaryFile(prefix=".doctor-", dir=folder) as file:
            file.write(b".")
            file.flush()
            skew = os.stat(file.name).st_mtime - subject.now()
    except OSError:
        return
    message = (
        f"files of {folder} are dated {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} this machine's clock"
    )
    remedy = (
        "set both by NTP (chronyc tracking); runs go by steps, not dates, but logs of several nodes will not line up"
    )
    yield ok(message) if abs(skew) <= _TOLERATED_S else warn(message, remedy)


_PROBE_BYTES = 2**24
_SLOW_BYTES_PER_S = 20e6
_LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "tmpfs", "ramfs", "overlay"}


def check_disk(subject: Subject) -> Iterable[Finding]:
    """Check that the disk can be written, its free space, and whether several nodes see the same files."""
    folder = subject.existing_folder
    try:
        rate = written_per_second(folder)
    except OSError as error:
        yield fail(
            f"{folder} cannot be written ({error.strerror or error})", "set output_dir to a folder you can write to"
        )
        return
    message = f"{folder}: write, fsync and rename work; {rate / 1e6:,.0f} MB/s from one process"
    slow = "a network disk for small files? set output_dir to a faster one, or save more rarely (checkpoint.every)"
    yield ok(message) if rate > _SLOW_BYTES_PER_S else warn(message, slow)
    yield from _room(subject, folder, rate)
    yield from _shared(subject, folder)


def written_per_second(folder: Path) -> float:
    """Return the bytes written per second to a new file, fsync included.

    All operations that a checkpoint needs are tried, and all files are removed afterwards.

    Raises:
        OSError: an operation does not work.
    """
    place = Path(tempfile.mkdtemp(prefix=".doctor-", dir=folder))
    try:
        block = os.urandom(2**20)
        start = time.monotonic()
        with (place / "probe.tmp").open("xb") as file:
            for _ in range(_PROBE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.monotonic() - start
        (place / "probe.tmp").rename(place / "probe")
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return _PROBE_BYTES / max(seconds, 1e-9)


def _room(subject: Subject, folder: Path, rate: float) -> Iterable[Finding]:
    config, vocab_size = subject.config, subject.vocab_size
    if config is None or vocab_size is None:
        return
    from megadiff.run.summary import checkpoint_bytes

    one = checkpoint_bytes(config, config.shape(vocab_size=vocab_size))
    kept = config.checkpoint.keep or -(-config.steps // config.checkpoint.every)
    needed, free = one * (kept + 1), shutil.disk_usage(folder).free
    message = (
        f"{kept} checkpoint(s) kept and one being written take {needed / 2**30:.3g} GiB ({one / 2**30:.3g} GiB each, "
        f"{one / rate:,.0f} s at one process's rate); {free / 2**30:.3g} GiB are free"
    )
    remedy = "free some space, lower checkpoint.keep (0 keeps all), or set output_dir to a larger disk"
    yield ok(message) if needed <= free else fail(message, remedy)


def _shared(subject: Subject, folder: Path) -> Iterable[Finding]:
    if subject.nodes == 1:
        return
    kind = file_system_of(folder)
    message = (
        f"{subject.nodes} nodes must see one {folder}, which is on {kind}; that cannot be checked from a single node"
    )
    remedy = (
        f"see that `srun -N {subject.nodes} ls -di {folder}` prints one number; if not, set output_dir to a shared disk"
    )
    yield warn(f"{message}, but {kind} is usually a node's own" if kind in _LOCAL else message, remedy)


def file_system_of(folder: Path) -> str:
    """Return the type of the file system that holds a folder, as the kernel names it."""
    real = str(folder.resolve())
    mounts = [
        line.split() for line in Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    ]
    holding = [(len(point), kind) for _, point, kind, *_ in mounts if f"{real}/".startswith(f"{point.rstrip('/')}/")]
    return max(holding, key=lambda found: found[0])[1] if holding else "an unknown file system"


def check_kernels(subject: Subject) -> Iterable[Finding]:
    """List the available fast kernels; on CPU none is needed."""
    from megadiff.platform.machine import apex_project

    apex = apex_project()
    if apex == "other":
        yield warn(
            "the installed package `apex` is not NVIDIA's Apex but another project of that name on PyPI",
            "pip uninstall apex; Transformer Engine replaces Apex, or build NVIDIA's from source",
        )
    yield from _refused(subject)
    present = {"Triton": _is_there("triton"), "Transformer Engine": _is_there("transformer_engine")}
    found = [name for name, has in {**present, "Apex": apex == "nvidia"}.items() if has]
    if subject.platform.is_cpu:
        yield ok(f"CPU: plain torch kernels are used; installed: {', '.join(found) or 'no others'}")
        return
    yield ok(f"{subject.platform.device_name}; installed: {', '.join(found) or 'no fast kernels'}")
    if present["Transformer Engine"] and subject.platform.layers_problem:
        yield warn(
            f"Transformer Engine is installed, but {subject.platform.layers_problem}",
            "install transformer-engine[pytorch]>=2.9,<2.12 for this torch; until then layers are local, without FP8",
        )
    if subject.platform.weight_gradients is None:
        yield warn(
            f"weight gradients are accumulated in a separate step: {subject.platform.weight_gradients_problem}",
            "install torch 2.11 or newer, or build NVIDIA's Apex",
        )
    if not present["Transformer Engine"]:
        yield warn("no Transformer Engine: slower layers, no FP8", "pip install 'megadiff[te]' beside a CUDA torch")
    if not present["Triton"]:
        yield warn("no Triton: fused kernels fall back to plain torch", "pip install triton (CUDA torch brings it)")


def _refused(subject: Subject) -> Iterable[Finding]:
    """Report settings of the run that this machine cannot provide."""
    if subject.config is None:
        return
    from megadiff.errors import PlatformError
    from megadiff.model.kernels import check_kernels

    try:
        check_kernels(subject.config.parallel, subject.config.precision, subject.platform)
    except PlatformError as error:
        yield fail(str(error), "remove that setting, or run on a machine that supports it")


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


_BASE, _PER_RANK, _COMFORT = 128, 8, 1024


def check_open_files(subject: Subject) -> Iterable[Finding]:
    """Compare the limit with the needs of a rank: data files, its log, and sockets to the ranks of each of its
    groups."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    sources = (
        len(subject.config.data.training_sources) + len(subject.config.data.valid) if subject.config is not None else 0
    )
    needed = _BASE + _PER_RANK * subject.ranks + 2 * sources
    if soft == resource.RLIM_INFINITY:
        yield ok("a process may open any number of files")
        return
    message = f"a process may open {soft} files; {subject.ranks} rank(s) may need about {needed} each"
    ceiling = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    remedy = f"ulimit -n {max(4096, 2 * needed)} before the launch (the hard limit is {ceiling})"
    if soft < needed:
        yield fail(message, remedy)
    else:
        yield ok(message) if soft >= _COMFORT else warn(message, remedy)


DEFAULT_PORT = 29500
"""Port that torchrun uses on one node if none is given."""

_PATIENCE_S = 3.0
_FREE_ONE = "set MASTER_PORT, or torchrun --master-port, to a free one, or end the process that holds it"


def check_ports(subject: Subject) -> Iterable[Finding]:
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


_BYTES_ON_CPU, _BYTES_ON_GPU = 2**24, 2**30


def check_shared_memory(subject: Subject) -> Iterable[Finding]:
    """Check its size: containers start with 64 MiB, which is enough on CPU only."""
    remedy = "start the container with --shm-size=8g or --ipc=host, or mount a larger tmpfs there"
    try:
        size = shutil.disk_usage(subject.shared_memory).total
    except OSError as error:
        yield warn(f"{subject.shared_memory} cannot be used ({error.strerror})", remedy)
        return
    wanted = _BYTES_ON_CPU if subject.platform.is_cpu else _BYTES_ON_GPU
    message = f"{subject.shared_memory} has {size / 2**20:,.0f} MiB"
    yield ok(message) if size >= wanted else warn(f"{message}, wanted {wanted / 2**20:,.0f}", remedy)


@dataclass(frozen=True)
class Range:
    """A range of versions from `low` up to but excluding `high`, compared by their leading numbers."""

    project: str
    low: tuple[int, ...]
    high: tuple[int, ...] | None
    below: str
    """Problem of older versions."""
    is_needed: bool = True


_HOLES = "loading a file can corrupt memory or run code (CVE-2025-32434 below 2.6, CVE-2026-24747 below 2.10)"
_RANGES = (
    Range("torch", (2, 10), None, _HOLES),
    Range(
        "megatron-core",
        *megatron_versions.SUPPORTED,
        "untried here; below 0.15.3 also CVE-2026-24150 and CVE-2026-24152",
    ),
    Range("numpy", (1, 26), None, "untried here"),
    Range("transformer-engine", (2, 9), (2, 12), "untried with megatron-core 0.16 to 0.19", is_needed=False),
)


def check_versions(subject: Subject) -> Iterable[Finding]:
    """Check Python first, then each library."""
    del subject
    found = sys.version_info[:2]
    message = ".".join(map(str, found))
    if (3, 10) <= found < (3, 14):
        yield ok(f"Python {message}")
    else:
        yield fail(f"Python {message}, wanted 3.10 to 3.13", "make the virtual environment with one of those")
    for wanted in _RANGES:
        try:
            yield judge(wanted, version(wanted.project))
        except PackageNotFoundError:
            if wanted.is_needed:
                yield fail(f"{wanted.project} is not installed", f"pip install '{requirement(wanted)}'")


def judge(wanted: Range, text: str) -> Finding:
    """Return the finding for an installed version."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", text)[:3])
    remedy = f"pip install '{requirement(wanted)}'"
    if numbers < wanted.low:
        return fail(f"{wanted.project} {text}: {wanted.below}", remedy)
    if wanted.high is not None and numbers >= wanted.high:
        return warn(f"{wanted.project} {text} is newer than any this release was tested with", remedy)
    return ok(f"{wanted.project} {text}")


def requirement(wanted: Range) -> str:
    """Return the requirement in pip's syntax."""
    low, high = (".".join(map(str, numbers)) for numbers in (wanted.low, wanted.high or ()))
    return f"{wanted.project}>={low}" + (f",<{high}" if high else "")
