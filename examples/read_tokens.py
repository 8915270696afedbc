"""Read a token file with PyArrow and NumPy alone: python examples/read_tokens.py TOKENS.parquet"""

import sys

import numpy as np
import pyarrow.parquet as pq

file = pq.ParquetFile(sys.argv[1])
footer = {name.decode(): value.decode() for name, value in file.metadata.metadata.items()}
bits, (height, width) = int(footer["bsqtok.bits"]), map(int, footer["bsqtok.grid"].split(","))
assert bits <= 25, "longer tokens need a 64-bit word, or np.unpackbits(..., bitorder='little')"

for batch in file.iter_batches(columns=["key", "clip", "view", "frames", "tokens"]):
    for row in batch.to_pylist():
        first_bit = np.arange(row["frames"] * height * width) * bits
        octets = np.frombuffer(row["tokens"] + bytes(4), np.uint8).astype(np.uint32)
        words = sum(octets[(first_bit >> 3) + place] << np.uint32(8 * place) for place in range(4))
        indices = (words >> (first_bit & 7).astype(np.uint32)) & np.uint32((1 << bits) - 1)
        tokens = indices.reshape(row["frames"], height, width)
        print(row["key"], row["clip"], row["view"], *tokens.flat)
