"""Reading bytes that nobody vouches for: every read is bounded, and what is wrong is said."""

from __future__ import annotations

import zlib

from pared.core.errors import FileError

_LONGEST = 9  # bytes of a number: 63 bits


class Cursor:
    """A place in a string of bytes that moves on with each read, and never past the end.

    Args:
        data: the bytes.
        name: of what is read, for messages.

    >>> cursor = Cursor(bytes([3, 0xAC, 0x02]), "x.pared")
    >>> cursor.number("a count"), cursor.number("a count"), cursor.left
    (3, 300, 0)
    """

    def __init__(self, data: bytes | memoryview, name: str) -> None:
        self.data, self.name, self.place = memoryview(data), name, 0

    @property
    def left(self) -> int:
        """How many bytes are left."""
        return len(self.data) - self.place

    def take(self, count: int, what: str) -> memoryview:
        """The next `count` bytes.

        Raises:
            FileError: if there are fewer.
        """
        if count > self.left:
            raise self.error(f"{what} should have {count:,} bytes and {self.left:,} are left: the file is cut off or damaged")
        part = self.data[self.place : self.place + count]
        self.place += count
        return part

    def number(self, what: str, most: int = (1 << 63) - 1) -> int:
        """The next variable-length number: seven bits a byte, the lowest first, the top bit set on all but the last byte.

        Raises:
            FileError: if it is cut off, longer than nine bytes, longer than it needs to be, or above `most`.
        """
        value = 0
        for index in range(_LONGEST):
            byte = self.take(1, what)[0]
            value |= (byte & 0x7F) << (7 * index)
            if byte < 0x80:
                if byte == 0 and index:
                    raise self.error(f"{what} is written longer than it needs to be")
                if value > most:
                    raise self.error(f"{what} is {value:,}, and at most {most:,} is possible")
                return value
        raise self.error(f"{what} is longer than {_LONGEST} bytes")

    def end(self, what: str) -> None:
        """Check that nothing is left."""
        if self.left:
            raise self.error(f"{self.left:,} bytes too many after {what}")

    def error(self, reason: str) -> FileError:
        """The exception to raise, with the file's name before the reason."""
        return FileError(f"{self.name}: {reason}.")


def number(value: int) -> bytes:
    """`value` as `Cursor.number` reads it.

    >>> number(300).hex()
    'ac02'
    """
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def checksum(*parts: bytes | memoryview) -> bytes:
    """CRC-32 (that of zip and PNG) of the parts one after the other, four bytes, the lowest first."""
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return value.to_bytes(4, "little")
