"""Real text that every Python carries: the paragraphs of the language reference, as `help()` shows them."""

from __future__ import annotations

from pydoc_data.topics import topics


def paragraphs(count: int) -> list[str]:
    """`count` paragraphs of prose, drawn evenly from all topics, in the order of the reference.

    Their lengths are what they are: from a line of six words to half a page. Code blocks, tables and
    grammar are left out.
    """
    prose: dict[str, None] = {}  # in order, and each paragraph once
    for topic in sorted(topics):
        for block in topics[topic].split("\n\n"):
            words = block.split()
            if (
                len(words) >= 6
                and not block.startswith("   ")
                and "::=" not in block
                and words[-1][-1] in ".:"
            ):
                prose.setdefault(" ".join(words))
    if len(prose) < count:
        raise ValueError(f"{count} paragraphs were asked for, this Python's pydoc_data has {len(prose)}")
    ordered = list(prose)
    return [ordered[index * len(ordered) // count] for index in range(count)]
