"""What the kernel says of a process in a container: rights, limits, sockets."""

from __future__ import annotations

from pathlib import Path


def status(pid: int) -> dict[str, str]:
    """Return the fields of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def mount_options(pid: int) -> dict[str, set[str]]:
    """Return the options of each mount, by the path that the process sees."""
    found = {}
    for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines():
        fields = line.split()
        found[fields[4]] = set(fields[5].split(","))
    return found


def memory_limit_and_peak(pid: int) -> tuple[int, int]:
    """Return the bytes that the process's cgroup may use and the most that it did."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            folder = Path("/sys/fs/cgroup/memory" + path)
            names = ("memory.limit_in_bytes", "memory.max_usage_in_bytes")
        elif controllers == "" and Path("/sys/fs/cgroup" + path, "memory.max").exists():
            folder = Path("/sys/fs/cgroup" + path)
            names = ("memory.max", "memory.peak")
        else:
            continue
        limit, peak = (int((folder / name).read_text()) for name in names)
        return limit, peak
    raise AssertionError(f"process {pid} is in no cgroup of memory")


def listening(pid: int) -> set[tuple[str, int]]:
    """Return (IPv4 address, port) of each TCP socket that listens in the process's network.

    Sockets of IPv6 that take IPv4 too, as gRPC's are, count by their IPv4 address.
    """
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            if state == "0A":
                address, port = local.split(":")
                # The last 32 bits, in the order of this machine.
                octets = bytes.fromhex(address[-8:])[::-1]
                found.add((".".join(map(str, octets)), int(port, 16)))
    return found
