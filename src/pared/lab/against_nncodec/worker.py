"""What the Python of nncodec runs: pack the tensors of an .npz with it, unpack them, and say what it took. Nothing of pared is imported.

python worker.py TENSORS.npz REPEATS
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def main(source: str, repeats: int) -> dict[str, object]:
    """Bytes, processor seconds and whether every integer came back."""
    from nncodec import nnc  # pyright: ignore[reportMissingImports]

    tensors = dict(np.load(source))
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        # at qp 0 a step is 1: integers are coded as they are
        packed = nnc.compress(
            {name: tensor.copy() for name, tensor in tensors.items()}, bitstream_path=str(Path(folder) / "x.nnc"), qp=0, use_dq=False,
            return_bitstream=True, verbose=False,
        )  # fmt: skip
        encoding = time.process_time() - start
    decoding = []
    for _ in range(repeats):
        start = time.process_time()
        found = nnc.decompress(packed)
        decoding.append(time.process_time() - start)
    same = all(np.array_equal(found[name], tensor) for name, tensor in tensors.items())
    return {"bytes": len(packed), "encode_seconds": encoding, "decode_seconds": min(decoding), "same": same}


if __name__ == "__main__":
    with contextlib.redirect_stdout(io.StringIO()):
        answer = main(sys.argv[1], int(sys.argv[2]))
    print(json.dumps(answer))
