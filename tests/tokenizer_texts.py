"""What several tests of tokenizers share: hostile texts, and a small vocabulary of whole words and pieces."""

from pathlib import Path

import pytest

from electra_core.hub.tokenizer_parts import SPECIAL_TOKENS
from electra_core.tokenizer import WordPieceTokenizer

TORTURE = [
    "",
    " ",
    "\u200b \ufeff",  # nothing but what is dropped
    "Café naïve ÉÀÜ ßẞ İı ŉ ǰ Straße",
    "e\u0301 a\u0308\u0323 \u0301x x\u0304\u0304",  # combining marks, one without a letter
    "A\u030a\u0327 Z\u0351\u036b\u0343\u033d",
    "東京タワー 中文字符 㐀𠀀 한국어 ภาษาไทย हिन्दी עברית عربى",
    "\uac00\u11a8 \u1100\u1161",  # Hangul in syllables and in letters
    "😀👩‍👩‍👧‍👦🏳️‍🌈 ☃️ 𝓗𝓮𝓵𝓵𝓸 𝟙𝟚",
    "a\x01b\x07c\x1cd\x1fe\x7ff\x80g\x9fh \ue000 \U0010ffff \ufffd",
    f"{'x' * 99} {'y' * 100} {'z' * 101} {'w' * 5000}",  # words around and beyond the longest
    "line\u0085next\u2028para\u2029x\x0b\x0cy\tz\r\n",
    "zero\u200bwidth\u200c\u200d\ufeffjoin\u2060er soft\u00adhyphen \u202eRTL\u202c",
    "\u3000ideo\u3000graphic\u00a0nbsp\u2009thin",
    "«quotes» “x” ‘y’ —–-… $€£¥ +=<>|~^` http://x.y/z?a=b&c=d_e #hash @user don't",
    "ﬁ ﬂ ½ ² ™ ℡ ㎏ ｆｕｌｌ ΟΔΥΣΣΕΥΣ ς",
    "▁ under▁score ##ing [ MASK ] [mask]",
]


@pytest.fixture
def wordpiece(tmp_path: Path) -> WordPieceTokenizer:
    words = ["the", "cat", "##s", "Cat", "sat", ",", ".", "caf", "##e", "##é", "東", "京", "mask", "[", "]"]
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, *words]) + "\n", "utf-8")
    return WordPieceTokenizer.from_vocab(tmp_path / "vocab.txt")
