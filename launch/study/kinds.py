"""What kind of word each token of a text is part of, by rules that anyone can check by eye."""

import string

import numpy as np

from data import Tokenizer

FUNCTION_WORDS = frozenset(
    [
        "a",
        "an",
        "the",
        "this",
        "that",
        "these",
        "those",
        "of",
        "in",
        "on",
        "at",
        "by",
        "for",
        "with",
        "from",
        "to",
        "into",
        "as",
        "if",
        "then",
        "than",
        "so",
        "or",
        "and",
        "but",
        "not",
        "no",
        "nor",
        "is",
        "are",
        "was",
        "were",
        "be",
        "been",
        "being",
        "am",
        "it",
        "its",
        "he",
        "she",
        "they",
        "them",
        "their",
        "his",
        "her",
        "we",
        "us",
        "our",
        "you",
        "your",
        "i",
        "my",
        "me",
        "which",
        "who",
        "whom",
        "whose",
        "what",
        "when",
        "where",
        "how",
        "all",
        "any",
        "each",
        "both",
        "such",
        "only",
        "own",
        "same",
        "do",
        "does",
        "did",
        "has",
        "have",
        "had",
        "can",
        "could",
        "will",
        "would",
        "shall",
        "should",
        "may",
        "might",
        "must",
        "there",
        "here",
        "also",
        "just",
        "very",
    ]
)
KINDS = (
    "function word",
    "punctuation",
    "number",
    "name, for the first time",
    "name, repeated",
    "other word, for the first time",
    "other word, repeated",
)
_NO_KIND = -1
_SPACE = "\u2581"  # SentencePiece's
_MARKS = string.punctuation.replace("_", "")


def kinds_of(tokenizer: Tokenizer, tokens_N: np.ndarray) -> np.ndarray:
    """The number in KINDS of the word that each token belongs to, -1 for control tokens and bytes, int [N].

    Words stand between spaces; marks around and within them are punctuation. A name has a capital letter after its
    first one, an underscore or a digit, or begins with a capital and does not begin a sentence. It, and any other word,
    is repeated where the text has had it before.
    """
    kinds = np.full(len(tokens_N), _NO_KIND, np.int64)
    words: list[tuple[str, list[int]]] = []
    begins_word = True
    for place, token in enumerate(tokens_N):
        piece = tokenizer.piece(int(token))
        if piece.startswith("<") and piece.endswith(">"):
            begins_word = True
            continue
        text = piece.lstrip(_SPACE)
        if not any(character.isalnum() or character == "_" for character in text):
            kinds[place] = KINDS.index("punctuation") if text.strip() else _NO_KIND
            begins_word = True
            if text:
                words.append((text if text.strip() else ".", []))  # a line ends a sentence
            continue
        if begins_word or piece.startswith(_SPACE):
            words.append(("", []))
        last, places = words[-1]
        words[-1] = last + text, [*places, place]
        begins_word = False
    seen: set[str] = set()
    before = "."
    for word, places in words:
        if places:
            bare = word.strip(_MARKS) or word
            kinds[places] = KINDS.index(_kind(bare, before, seen))
            seen.add(bare.lower())
        before = word
    return kinds


def _kind(word: str, before: str, seen: set[str]) -> str:
    """`word` has no marks around it, and `before` has them."""
    if word.lower() in FUNCTION_WORDS:
        return "function word"
    if word.replace(".", "").isdigit():
        return "number"
    named = word[:1].isupper() and not before.endswith((".", "!", "?", ":"))
    kind = "name" if named or "_" in word or any(c.isupper() or c.isdigit() for c in word[1:]) else "other word"
    return f"{kind}, {'repeated' if word.lower() in seen else 'for the first time'}"
