"""The demo model's tokenizer: byte-pair encoding learned from its captions, in CLIP's layout."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

from calotype_train.demo.scenes import random_scene

POSITIONS = 32  # tokens of a prompt, start and end markers included
END_OF_WORD = "</w>"


def build_tokenizer(*, captions: int = 20_000, merges: int = 400, seed: int = 0) -> Any:
    """A `CLIPTokenizer`: 256 byte characters, the same ending a word, the merges, start and end markers.

    Any text can be encoded; words of the captions take one token, unknown ones several.
    """
    from transformers import CLIPTokenizer  # noqa: PLC0415
    from transformers.convert_slow_tokenizer import bytes_to_unicode  # noqa: PLC0415

    rng = random.Random(seed)
    words = Counter(word for _ in range(captions) for word in random_scene(rng, width=128, height=128).caption.split())
    learned = learn_merges(words, merges)
    letters = list(bytes_to_unicode().values())
    pieces = [*letters, *(letter + END_OF_WORD for letter in letters), *(a + b for a, b in learned)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={piece: index for index, piece in enumerate(dict.fromkeys(pieces))},
        merges=learned,
        model_max_length=POSITIONS,
    )


def learn_merges(words: Counter[str], count: int) -> list[tuple[str, str]]:
    """Byte-pair encoding (Sennrich et al. 2016): repeatedly merge the most common neighbouring pair."""
    pieces = {word: [*word[:-1], word[-1] + END_OF_WORD] for word in words}
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, split in pieces.items():
            for pair in itertools.pairwise(split):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, split in pieces.items():
            pieces[word] = _merge(split, best)
    return merges


def _merge(split: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in split:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save in the files that every version of transformers reads."""
    tokenizer.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    settings["model_max_length"] = POSITIONS
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
