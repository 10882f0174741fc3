"""Compiled kernels as files: the cache that keeps them, and what a cubin says of its kernels."""

import contextlib
import hashlib
import os
import stat
import struct
import tempfile
from pathlib import Path

_DIGEST = 32  # bytes of a sha256: an entry is the digest of the cubin, then the cubin


def read(key):
    """The cubin kept under `key`, or None; an entry that was cut short or changed counts as none."""
    for folder in _folders():
        with contextlib.suppress(OSError):
            entry = (folder / f"{key}.cubin").read_bytes()
            if hashlib.sha256(entry[_DIGEST:]).digest() == entry[:_DIGEST]:
                return entry[_DIGEST:]
    return None


def write(key, cubin):
    """Keep `cubin` under `key`, in the first folder that takes it; without one, silently nowhere.

    Other processes see no entry or a whole one, whichever of them comes first.
    """
    for folder in _folders(create=True):
        with contextlib.suppress(OSError):
            _replace(folder / f"{key}.cubin", hashlib.sha256(cubin).digest() + cubin)
            return


def _replace(path, data):
    """Write a file beside `path`, then give it that name in one step."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _folders(create=False):
    """The cache folders that exist (or can be made), the preferred one first."""
    for place in (_preferred, _temporary):
        with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: a user without a home
            folder = place()
            if create:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if place is _preferred or _private(folder):
                yield folder


def _preferred():
    if named := os.environ.get("MAMBA_FAST_CACHE"):
        return Path(named).expanduser()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "mamba-fast"


def _temporary():
    user = os.getuid() if hasattr(os, "getuid") else "user"  # Windows: temporary files are per user
    return Path(tempfile.gettempdir()) / f"mamba-fast-{user}"


def _private(folder):
    """Whether nobody else can have put files into a folder whose name anybody can guess."""
    state = folder.lstat()
    if not hasattr(os, "getuid"):
        return stat.S_ISDIR(state.st_mode)
    return stat.S_ISDIR(state.st_mode) and state.st_uid == os.getuid() and not state.st_mode & 0o022


_REGISTERS, _STACK = 0x2F, 0x12  # EIATTR_REGCOUNT and EIATTR_MIN_STACK_SIZE of the section .nv.info
_VALUE = 4  # EIFMT_SVAL: an attribute with a payload


def registers_and_spills(cubin):
    """What each kernel of a cubin needs, as ``cuobjdump -res-usage`` prints it, without a GPU.

    Returns {kernel: {"registers": a thread, "spilled": bytes of local memory a thread, "shared": bytes
    a block}}. "spilled" counts spilled registers and local arrays, of called functions too. "shared" is
    known at compile time: no dynamic shared memory, and the 1024 bytes that the system takes where it does.
    ValueError if `cubin` is no ELF file for a GPU.
    """
    if cubin[:5] != b"\x7fELF\x02" or struct.unpack_from("<H", cubin, 18) != (190,):  # EM_CUDA
        raise ValueError("cubin: expected a 64-bit ELF file for NVIDIA GPUs, got something else")
    sections, symbols = _sections(cubin)
    needs = {}
    for attribute, symbol, value in _attributes(cubin, *sections[".nv.info"]):
        if attribute in (_REGISTERS, _STACK):
            needs.setdefault(symbols[symbol], {})[attribute] = value
    return {
        kernel: {
            "registers": found[_REGISTERS],
            "spilled": found[_STACK],
            "shared": sections.get(f".nv.shared.{kernel}", (0, 0))[1],
        }
        for kernel, found in needs.items()
        if _STACK in found  # a device function has none of its own
    }


def _sections(cubin):
    """{name: (offset, bytes)} of the sections, and the names of the symbols."""
    (start,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    # name, type, flags, address, offset, size, link, info, alignment, size of an entry
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, start + i * size) for i in range(count)]
    sections = {_text(cubin, headers[names][4] + h[0]): h[4:6] for h in headers}
    offset, total = sections[".symtab"]
    strings = sections[".strtab"][0]
    starts = (struct.unpack_from("<I", cubin, at)[0] for at in range(offset, offset + total, 24))
    return sections, [_text(cubin, strings + at) for at in starts]


def _text(cubin, start):
    return cubin[start : cubin.index(b"\0", start)].decode()


def _attributes(cubin, offset, total):
    """(attribute, symbol, value) of every attribute that .nv.info gives for a symbol."""
    end = offset + total
    while offset < end:
        form, attribute, size = struct.unpack_from("<BBH", cubin, offset)
        offset += 4
        if form == _VALUE:
            if size == 8:
                yield attribute, *struct.unpack_from("<II", cubin, offset)
            offset += size
