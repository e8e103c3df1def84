"""Zstandard frames, packed and unpacked within bounds."""

from __future__ import annotations

import zstandard

from pared.core.errors import FileError

Dictionary = zstandard.ZstdCompressionDict

_WINDOW_LOG = 23  # of the largest window: what a reader must have in memory besides the result


def pack(data: bytes | memoryview, level: int = 19, *, bare: bool = False, dictionary: Dictionary | None = None) -> bytes:
    """One frame without size, checksum and identifier of a dictionary; `bare` ones lack the magic number too.

    >>> data = b"again and " * 99
    >>> unpack(pack(data), 990, "it") == data
    True
    """
    usual = zstandard.ZstdCompressionParameters.from_level(level, source_size=len(data))
    parameters = zstandard.ZstdCompressionParameters.from_level(
        level, source_size=len(data), window_log=min(usual.window_log, _WINDOW_LOG), format=_format(bare),
        write_content_size=False, write_checksum=False, write_dict_id=False,
    )  # fmt: skip
    return zstandard.ZstdCompressor(dict_data=dictionary, compression_params=parameters).compress(data)


def unpack(packed: bytes | memoryview, size: int, what: str, *, bare: bool = False, dictionary: Dictionary | None = None) -> bytes:
    """What `pack` was given. Memory for `size` bytes and a window is reserved, whatever the frame says.

    Raises:
        FileError: if there isn't exactly one such frame, or it holds more or less than `size` bytes.
    """
    try:
        says = zstandard.get_frame_parameters(packed, format=_format(bare))
        if says.content_size != zstandard.CONTENTSIZE_UNKNOWN or says.dict_id or says.has_checksum:
            raise FileError(f"{what} can't be unpacked (the frame says more than it may).")
        reader = zstandard.ZstdDecompressor(dict_data=dictionary, format=_format(bare), max_window_size=1 << _WINDOW_LOG)
        data = reader.decompress(packed, max_output_size=max(size, 1), allow_extra_data=False)
    except (zstandard.ZstdError, ValueError) as error:
        raise FileError(f"{what} can't be unpacked ({error}).") from None
    if len(data) != size:
        raise FileError(f"{what} has {len(data):,} bytes instead of {size:,}.")
    return data


def _format(bare: bool) -> int:
    return zstandard.FORMAT_ZSTD1_MAGICLESS if bare else zstandard.FORMAT_ZSTD1
