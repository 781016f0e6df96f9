"""The paper's model on lm1b (One Billion Word), where it reports results similar to C4's.

    python -m data.prepare --source lm1b --input 'lm1b/news.en*' --output /data/lm1b --vocab-size 8k
    python -m trainer --config=configs/lm1b.py:d12 --workdir=/runs/lm1b-d12 --config.data.path=/data/lm1b

Slice: v4-32 for d12; sizes and options are those of configs/c4.py. Compare the validation perplexity of `:d12` and
`:d12,standard`. Sentences are shuffled and a context is many of them, so all that is far is stale: see what
`selection/forgotten_fraction` becomes here and on C4. Which sizes the paper trained, and for how long, is not known
here: STEPS are our choice.
"""

from ml_collections import ConfigDict

from configs import c4

STEPS = 65_536  # about 8.6 billion tokens at 256 x 512


def get_config(variant: str = "d12") -> ConfigDict:
    """`variant`: as in configs/c4.py."""
    c = c4.get_config(variant)
    c.steps = STEPS
    return c
