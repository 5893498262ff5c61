"""Cuts a CUDA library down to the device code that one kind of GPU would pick from it.

nvcc puts a kernel's code for each GPU generation side by side into a *fat binary*: a header of 16
bytes (magic, version, header size, size of what follows), then entries (kind, header size, size of
the code, compute capability), of which the driver loads one. All of vLLM's wheel is 60 times what
one generation needs. The layout is not documented by NVIDIA; it was read off vLLM's libraries, and
a library that does not look like it is refused.
"""

import struct
from dataclasses import dataclass

_MAGIC = struct.pack("<I", 0xBA55ED50)
_HEADER = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes of the entries
_ENTRY = struct.Struct("<HHIQIIHHI")  # kind, version, bytes of this header, bytes of the code, ...
_PTX, _MACHINE_CODE = 1, 2


@dataclass(frozen=True)
class _Entry:
    """One version of the code: where it lies in the library, and for which GPUs it is."""

    start: int
    stop: int
    kind: int
    capability: int


def trim(library: bytes, capability: int) -> bytes:
    """Return the library with the same layout and only one GPU's device code; the rest is zeros.

    A GPU runs machine code of its own major generation and of no later minor one. Of each fat
    binary the latest such code stays. Where there is none, and the driver would compile the text
    of an earlier generation instead (PTX, a third of the size), nothing does: kernels for quantized
    weights, which end with CUDA's "no kernel image" if they are called.

    Args:
        library: A shared library with fat binaries.
        capability: Of the GPU, times ten: 90 for an H100 or H200.

    Raises:
        ValueError: The library holds no fat binary, or one that is not laid out as described.

    """
    trimmed = bytearray(library)
    found = 0
    at = library.find(_MAGIC)
    while at >= 0:
        entries, stop = _entries(library, at)
        kept = b"".join(library[e.start : e.stop] for e in _picked(entries, capability))
        first = at + _HEADER.size
        trimmed[first:stop] = kept.ljust(stop - first, b"\0")
        magic, version, header, _ = _HEADER.unpack_from(library, at)
        _HEADER.pack_into(trimmed, at, magic, version, header, len(kept))
        found += 1
        at = library.find(_MAGIC, stop)
    if not found:
        raise ValueError("the library holds no device code")
    return bytes(trimmed)


def capabilities(library: bytes) -> dict[int, int]:
    """Count the machine codes of a library by compute capability."""
    counts: dict[int, int] = {}
    at = library.find(_MAGIC)
    while at >= 0:
        entries, stop = _entries(library, at)
        for entry in entries:
            if entry.kind == _MACHINE_CODE:
                counts[entry.capability] = counts.get(entry.capability, 0) + 1
        at = library.find(_MAGIC, stop)
    return counts


def _entries(library: bytes, at: int) -> tuple[list[_Entry], int]:
    _, _, header, size = _HEADER.unpack_from(library, at)
    start, stop = at + header, at + header + size
    if header != _HEADER.size or stop > len(library):
        raise ValueError(f"the fat binary at byte {at} has another layout than this reads")
    entries = []
    while start < stop:
        kind, _, own, code, _, _, _, _, capability = _ENTRY.unpack_from(library, start)
        if kind not in (_PTX, _MACHINE_CODE) or not 50 <= capability <= 130:
            raise ValueError(f"the code at byte {start} has another layout than this reads")
        entries.append(_Entry(start, start + own + code, kind, capability))
        start += own + code
    if start != stop:
        raise ValueError(f"the fat binary at byte {at} has another layout than this reads")
    return entries, stop


def _picked(entries: list[_Entry], capability: int) -> list[_Entry]:
    """Machine code that the GPU can run, the latest: there may be several of one capability."""
    oldest = capability // 10 * 10
    fitting = [
        entry
        for entry in entries
        if entry.kind == _MACHINE_CODE and oldest <= entry.capability <= capability
    ]
    latest = max((entry.capability for entry in fitting), default=0)
    return [entry for entry in fitting if entry.capability == latest]
