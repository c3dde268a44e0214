"""Writes encodings.json: T5's buckets, BLOOM's slopes and Marian's sines. Needs torch and transformers.

python tests/golden/make_encodings.py
"""

import json
from pathlib import Path

BUCKETS = [(32, 128), (64, 256), (16, 64), (32, 1000), (16, 4096), (12, 17), (8, 4000)]
HEADS = [1, 2, 3, 6, 8, 12, 16, 20, 32, 40, 112]
FARTHEST = 5000
POSITIONS, WIDTH = [0, 1, 2, 17, 100, 511], 32


def main():
    # Imported here, so that tests can import this file without them.
    import torch
    import transformers
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
    from transformers.models.t5.modeling_t5 import T5Attention

    starts = {}  # [distance, bucket] at each change of bucket, for query minus key
    far = torch.arange(-FARTHEST, FARTHEST + 1)
    for causal in (True, False):
        for num_buckets, max_distance in BUCKETS:
            bucket = T5Attention._relative_position_bucket(-far, not causal, num_buckets, max_distance)
            changes = [0, *(torch.nonzero(bucket[1:] != bucket[:-1]).ravel() + 1).tolist()]
            name = f"{num_buckets} {max_distance} {'causal' if causal else 'both'}"
            starts[name] = [[int(far[i]), int(bucket[i])] for i in changes]
    slopes = {n: build_alibi_tensor(torch.ones(1, 2), n, torch.float32)[:, 0, 1].tolist() for n in HEADS}
    marian = MarianSinusoidalPositionalEmbedding(max(POSITIONS) + 1, WIDTH)
    sines = marian.create_weight()[POSITIONS].tolist()
    table = {
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        "T5 buckets": starts,
        "BLOOM slopes": slopes,
        "Marian sines": sines,
    }
    rows = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in table.items())
    Path(__file__).with_name("encodings.json").write_text(f"{{{rows}}}\n")


if __name__ == "__main__":
    main()
