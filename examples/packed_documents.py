"""Several documents in one row: attention and selection stop at their borders, and padding is seen by nobody.

python examples/packed_documents.py
"""

import jax
import jax.numpy as jnp
import numpy as np

from selective_attention import selective_attention

LENGTHS, ROW, HEADS, WIDTH = (50, 100, 75), 256, 4, 32

# Ids say which document a token is of; negative ones are padding. Equal ids stand together.
segment_ids = np.full((1, ROW), -1, np.int32)
starts = np.cumsum((0, *LENGTHS))
for document, (start, length) in enumerate(zip(starts, LENGTHS, strict=False)):
    segment_ids[0, start : start + length] = document

q, k, v = (jax.random.normal(key, (1, ROW, HEADS, WIDTH)) for key in jax.random.split(jax.random.key(0), 3))
packed = selective_attention(q, k, v, segment_ids=jnp.asarray(segment_ids))

for document, (start, length) in enumerate(zip(starts, LENGTHS, strict=False)):
    own = slice(start, start + length)
    alone = selective_attention(q[:, own], k[:, own], v[:, own])
    difference = float(jnp.max(jnp.abs(packed[:, own] - alone)))
    print(f"document {document}, {length} tokens: {difference:.1e} from the same document in a row of its own")
    assert difference < 1e-5
print(f"padding: outputs of {float(jnp.max(jnp.abs(packed[:, starts[-1] :])))}")
