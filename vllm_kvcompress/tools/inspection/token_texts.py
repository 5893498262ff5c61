"""The text of each token of a prompt."""

from __future__ import annotations

from collections.abc import Sequence


def split_text(text: str, offsets: Sequence[tuple[int, int]], names: Sequence[str]) -> list[str]:
    """One string a token; together they give the text again.

    Characters that no token covers (spaces that a tokenizer drops) go with the token that follows,
    those at the end with the last. A character of several tokens goes with the first of them; the
    others are empty. A token that stands for no text, such as a beginning of sequence that the
    tokenizer adds, shows its name.

    Args:
        text: Text that was tokenized.
        offsets: Begin and end in ``text``, in characters, of every token.
        names: The vocabulary's name of every token.

    """
    pieces: list[str] = []
    position = 0
    for (begin, end), name in zip(offsets, names, strict=True):
        if begin == end:
            pieces.append(name)
            continue
        pieces.append(text[position:end])
        position = max(position, end)
    if pieces and position < len(text):
        pieces[-1] += text[position:]
    return pieces
