"""The paper's model on WikiText (WikiText-103, raw), where it reports results similar to C4's.

    python -m data.prepare --source wikitext --input wikitext-103-raw/wiki.{train,valid}.raw --output /data/wikitext \\
        --vocab-size 8k
    python -m trainer --config=configs/wikitext.py:d12 --workdir=/runs/wikitext-d12 --config.data.path=/data/wikitext

Slice: v4-32 for d12; sizes and options are those of configs/c4.py. Compare the validation perplexity of `:d12` and
`:d12,standard`. Which sizes the paper trained, and for how long, is not known here: STEPS are our choice, since C4's
would be hundreds of epochs. The checkpoint of the lowest validation loss is kept, whenever that was.
"""

from ml_collections import ConfigDict

from configs import c4

STEPS = 8_192  # about a billion tokens at 256 x 512


def get_config(variant: str = "d12") -> ConfigDict:
    """`variant`: as in configs/c4.py."""
    c = c4.get_config(variant)
    c.steps = STEPS
    c.eval.every_steps = 512
    return c
