"""What a job has written, as it may be shown on somebody's terminal: whoever submitted it may have meant that one."""

import codecs
import re
from collections.abc import Iterable, Iterator

# Colours, steps back and the end of a line to be erased, as programs write them, stay. What else a terminal obeys goes:
# titles, the clipboard, the cursor's place, questions that it answers as if somebody had typed.
_OBEYED = re.compile(
    r"(\x1b\[[0-9;:]*[mK])"
    r"|\x1b\[[0-?]*[ -/]*[@-~]?"
    r"|\x1b[\]PX^_][^\x07\x1b\n]*(?:\x07|\x1b\\)?"
    r"|\x1b[ -/]*[0-~]?"
    r"|[\x00-\x07\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f]"
)
_CUT_SHORT = re.compile(r"\x1b(?:\[[0-?]*[ -/]*|[\]PX^_][^\x07\x1b\n]*\x1b?|[ -/]*)?\Z")
# A longer one is none.
_LONGEST = 4096


def printable(text: str, kept: str = "") -> str:
    """`text` with a space in the place of each character that is none to look at, but for those in `kept`."""
    return "".join(character if character.isprintable() or character in kept else " " for character in text)


def harmless(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same text in UTF-8, without what a terminal would obey, however it is cut into pieces."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    kept = ""
    for piece in pieces:
        text = kept + decoder.decode(piece)
        begun = _CUT_SHORT.search(text)
        end = begun.start() if begun and len(text) - begun.start() <= _LONGEST else len(text)
        text, kept = text[:end], text[end:]
        yield _without(text)
    yield _without(kept + decoder.decode(b"", final=True))


def _without(text: str) -> bytes:
    return _OBEYED.sub(lambda found: found[1] or "", text).encode()
