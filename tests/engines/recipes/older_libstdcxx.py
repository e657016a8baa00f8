"""Let an extension built with GCC 13 or 14 be loaded where libstdc++ is GCC 12's.

    older_libstdcxx.py FILE...

The CPU builds of vLLM 0.8.5 to 0.11.2 ask for symbol versions that came with GCC 13, though the only symbols they
take from them are two that do nothing here: the marker that the stream library is initialised, and what is called
when an exception leaves a `noexcept` function. This renames the versions in the file to GCC 12's and points the two
symbols to old ones. On a machine with a newer libstdc++ the changed file works as well.
"""

from __future__ import annotations

import re
import struct
import sys
from pathlib import Path

NEWER = (
    (re.compile(rb"GLIBCXX_3\.4\.3[1-9]"), b"GLIBCXX_3.4.30"),
    (re.compile(rb"CXXABI_1\.3\.1[4-9]"), b"CXXABI_1.3.13"),
)
INSTEAD = {b"_ZSt21ios_base_library_initv": b"getpid", b"__cxa_call_terminate": b"abort"}

# ELF64, little endian: see elf(5)
SECTION = struct.Struct("<IIQQQQIIQQ")
VERNEED = struct.Struct("<HHIII")
VERNAUX = struct.Struct("<IHHII")
SYMBOL_BYTES = 24
#: The version index of a symbol that asks for no version.
VER_NDX_GLOBAL = 1


def elf_hash(name: bytes) -> int:
    value = 0
    for byte in name:
        value = (value << 4) + byte
        high = value & 0xF0000000
        value = (value ^ high >> 24) & ~high & 0xFFFFFFFF
    return value


class Library:
    """An ELF file in memory, as far as symbol versions go."""

    def __init__(self, image: bytearray) -> None:
        self.image = image
        (table,) = struct.unpack_from("<Q", image, 0x28)
        size, count, names = struct.unpack_from("<HHH", image, 0x3A)
        sections = [SECTION.unpack_from(image, table + i * size) for i in range(count)]
        #: name -> (offset, size, number of entries)
        self.sections = {self.text(sections[names][4] + s[0]).decode(): (s[4], s[5], s[7]) for s in sections}

    def text(self, offset: int) -> bytes:
        return bytes(self.image[offset : self.image.index(0, offset)])

    def write(self, offset: int, new: bytes) -> None:
        """Put a string where a longer one is."""
        room = len(self.text(offset)) + 1
        if len(new) >= room:
            raise ValueError(f"no room for {new!r}")
        self.image[offset : offset + room] = new.ljust(room, b"\0")

    def rename_versions(self) -> set[int]:
        """Rename what is too new; the indices of these versions."""
        strings = self.sections[".dynstr"][0]
        library, _, count = self.sections[".gnu.version_r"]
        renamed = set()
        for _ in range(count):
            _, versions, _, first, following = VERNEED.unpack_from(self.image, library)
            version = library + first
            for _ in range(versions):
                _, flags, index, name, next_one = VERNAUX.unpack_from(self.image, version)
                old = self.text(strings + name)
                for newer, known in NEWER:
                    if newer.fullmatch(old):
                        self.write(strings + name, known)
                        VERNAUX.pack_into(self.image, version, elf_hash(known), flags, index, name, next_one)
                        renamed.add(index & 0x7FFF)
                version += next_one
            library += following
        return renamed

    def redirect(self, renamed: set[int]) -> None:
        """Point every symbol of these versions to one that is there."""
        strings, symbols, versions = (self.sections[name][0] for name in (".dynstr", ".dynsym", ".gnu.version"))
        for i in range(self.sections[".dynsym"][1] // SYMBOL_BYTES):
            (version,) = struct.unpack_from("<H", self.image, versions + 2 * i)
            if version & 0x7FFF not in renamed:
                continue
            (name,) = struct.unpack_from("<I", self.image, symbols + SYMBOL_BYTES * i)
            symbol = self.text(strings + name)
            if symbol not in INSTEAD:
                raise ValueError(f"{symbol.decode()} is needed, and this machine's libstdc++ may not have it")
            self.write(strings + name, INSTEAD[symbol])
            struct.pack_into("<H", self.image, versions + 2 * i, VER_NDX_GLOBAL)


def mend(path: Path) -> bool:
    """Change a file if it is too new. Written under another name and renamed: it may be a hard link to a cache."""
    library = Library(bytearray(path.read_bytes()))
    renamed = library.rename_versions()
    if renamed:
        library.redirect(renamed)
        mode = path.stat().st_mode
        new = path.with_name(path.name + ".new")
        new.write_bytes(library.image)
        new.chmod(mode)
        new.replace(path)
    return bool(renamed)


if __name__ == "__main__":
    for argument in map(Path, sys.argv[1:]):
        print(f"{argument.name}: {'made loadable with' if mend(argument) else 'is fine with'} an older libstdc++")
