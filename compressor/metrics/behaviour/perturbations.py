"""Ask the same less neatly: seeded changes of a prompt.

`VARIANTS[name](prompt, seed)` gives the changed prompt: the same for the same seed in every process and on every
Python, since it becomes part of an item's hash. What the application writes around a question stays as it is (labels
such as `Question:`, the cue `Answer:` and all on its line, lines of lettered or numbered choices); only `paraphrase`
rewords labels. Digits stay, since another number is another question. A prompt in which a variant finds nothing to
change comes back as it was. Choices inside a running line are not recognised.

`paraphrase` is a short list of English rules, not a model: another frame where there is a `Question:`, contractions
made and undone, and some function phrases (`due to` for `because of`). It keeps the meaning and changes little.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from random import Random
from typing import TypeVar

Item = TypeVar("Item")

TYPO_RATE = 0.05  # of letters; at most one typo in a word
CASE_RATE = 0.15  # of letters
DROP_RATE = 0.10  # of words

_CHOICE = r"\(?(?:[A-Ja-j]|\d{1,2})[.)][ \t]+\S.*"
_ANSWER = r"(?:(?:[A-Z][a-z]* )?[Aa]nswer|A):.*"
_LABEL = r"[A-Z][A-Za-z]*(?: [a-z]+)?:(?:[ \t]+|$)"
_FRAME = re.compile(rf"^[ \t]*(?:{_CHOICE}|{_ANSWER}|{_LABEL})|\b[A-Z][a-z]*:[ \t]*\Z", re.MULTILINE)
_QUESTION = re.compile(r"^[ \t]*(?:Question|Q):[ \t]*", re.MULTILINE)
_FRAME_LABEL = re.compile(r"^([ \t]*)(Question|Q|Answer|A):", re.MULTILINE)

_LETTERS = re.compile(r"[^\W\d_]{2,}")
_LETTER = re.compile(r"[^\W\d_]")
_ANYTHING = re.compile(r".+", re.DOTALL)
_INNER_WORD = re.compile(r"(?<=\S)[^\S\n]+(\S+)")
_KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_NEIGHBOURS = {row[i]: row[max(0, i - 1) : i] + row[i + 1 : i + 2] for row in _KEYBOARD for i in range(len(row))}
# Without one of these the question is another one
_TURNING_WORDS = {
    "not", "no", "never", "none", "nor", "neither", "cannot", "without", "except", "unless", "only", "least", "most",
    "more", "less", "fewer", "before", "after",
}  # fmt: skip

FRAMES = (
    ("Q:", "A:"),
    ("Here is a question:", "The answer:"),
    ("Please answer this question:", "Answer:"),
    ("The question is:", "The answer is:"),
)
_NOT = {
    "don't": "do not", "doesn't": "does not", "didn't": "did not", "isn't": "is not", "aren't": "are not",
    "wasn't": "was not", "weren't": "were not", "can't": "cannot", "couldn't": "could not", "won't": "will not",
    "wouldn't": "would not", "shouldn't": "should not", "hasn't": "has not", "haven't": "have not", "hadn't": "had not",
}  # fmt: skip
_SUBJECTS = ("i", "you", "we", "they", "he", "she", "it", "that", "this", "there")
PHRASES = {
    "of the following": "of these", "in order to": "to", "so as to": "to", "such as": "like",
    "because of": "due to", "due to": "because of", "for example": "for instance", "for instance": "for example",
    "most likely": "most probably", "primarily": "mainly", "mainly": "primarily", "therefore": "thus",
    "thus": "therefore", "approximately": "roughly", "is able to": "can", "are able to": "can", "prior to": "before",
    "a number of": "several", "how do I": "how can I", "how do you": "how can you", "how would you": "how could you",
    "what is the": "what's the", "what is a": "what's a", "what is an": "what's an", "who is the": "who's the",
}  # fmt: skip
# A contraction is undone after its subject only: "why don't you" does not become "why do not you"
_REWORDED = (
    {phrase.lower(): other for phrase, other in PHRASES.items()}
    | {long: short for short, long in _NOT.items()}
    | {f"{subject} {short}": f"{subject} {long}" for subject in _SUBJECTS for short, long in _NOT.items()}
)
_PHRASE = re.compile(
    r"\b(?:" + "|".join(re.escape(phrase) for phrase in sorted(_REWORDED, key=len, reverse=True)) + r")\b",
    re.IGNORECASE,
)

DISTRACTORS = (
    "The bus to the harbour leaves from the other side of the square.",
    "My cousin painted the kitchen door green last spring.",
    "There was a light breeze over the lake that morning.",
    "The library closes early on the last day of the month.",
    "Someone had left an umbrella next to the piano.",
    "The bakery on the corner sells out of rolls before noon.",
    "A letter for the neighbours had been lying on the stairs for days.",
    "They had planned to repaint the fence, but it kept raining.",
    "The old clock in the hall is always a little slow.",
    "Her scarf was still hanging on the back of the chair.",
    "The choir practises in the room above the post office.",
    "He had put the ladder away behind the shed.",
)


def typos(prompt: str, seed: int) -> str:
    """With slips of the keyboard: a neighbouring key, two letters swapped, one dropped or doubled; at least one."""
    random = _random("typos", prompt, seed)
    words = _found(prompt, _LETTERS)
    hit = [word for word in words if random.random() >= (1 - TYPO_RATE) ** len(word.group())]
    if words and not hit:
        hit = [_one_of(words, random)]
    return _edited(prompt, [(word.span(), _mistyped(word.group(), random)) for word in hit])


def case_random(prompt: str, seed: int) -> str:
    """With some letters in the other case; at least one."""
    random = _random("case_random", prompt, seed)
    letters = [letter for letter in _found(prompt, _LETTER) if letter.group().swapcase() != letter.group()]
    hit = [letter for letter in letters if random.random() < CASE_RATE]
    if letters and not hit:
        hit = [_one_of(letters, random)]
    return _edited(prompt, [(letter.span(), letter.group().swapcase()) for letter in hit])


def case_lower(prompt: str, seed: int) -> str:
    """In lower case. The seed changes nothing."""
    _check("case_lower", prompt)
    return _edited(prompt, [(part.span(), part.group().lower()) for part in _found(prompt, _ANYTHING)])


def case_upper(prompt: str, seed: int) -> str:
    """In capitals. The seed changes nothing."""
    _check("case_upper", prompt)
    return _edited(prompt, [(part.span(), part.group().upper()) for part in _found(prompt, _ANYTHING)])


def drops(prompt: str, seed: int) -> str:
    """With one word in ten left out, at least one.

    Never the first word of a line, one with a digit, one that turns the question over (`not`, `except`, `least`), or
    the last word of an unfinished sentence, which the answer has to fit.
    """
    random = _random("drops", prompt, seed)
    words = _found(prompt, _INNER_WORD)
    asked = prompt.rstrip()
    unfinished = len(asked) if asked and asked[-1] not in ".?!" else None
    possible = [word for word in words if _may_go(word.group(1)) and word.end() != unfinished]
    wanted = min(len(possible), max(1, round(DROP_RATE * len(words))))
    ranked = sorted((random.random(), word.span()) for word in possible)
    return _edited(prompt, [(span, "") for _, span in ranked[:wanted]])


def paraphrase(prompt: str, seed: int) -> str:
    """In slightly other words, by the rules of this module; the seed chooses the frame."""
    random = _random("paraphrase", prompt, seed)
    edits = []
    for found in _found(prompt, _PHRASE):
        other = _REWORDED[found.group().lower()]
        edits.append((found.span(), other[0].upper() + other[1:] if found.group()[0].isupper() else other))
    return _reframed(_edited(prompt, edits), random)


def distractor(prompt: str, seed: int) -> str:
    """With a sentence before it that has nothing to do with it: after the last `Question:`, else at the start."""
    sentence = _one_of(DISTRACTORS, _random("distractor", prompt, seed))
    questions = [match.end() for match in _QUESTION.finditer(prompt)]
    at = questions[-1] if questions else len(prompt) - len(prompt.lstrip())
    before = prompt[:at]
    gap = " " if questions and before.endswith(":") else ""
    return f"{before}{gap}{sentence} {prompt[at:]}"


VARIANTS: dict[str, Callable[[str, int], str]] = {
    "typos": typos,
    "case_random": case_random,
    "case_lower": case_lower,
    "case_upper": case_upper,
    "drops": drops,
    "paraphrase": paraphrase,
    "distractor": distractor,
}


def _random(variant: str, prompt: str, seed: int) -> Random:
    # Not hash(), which differs between processes. Only random() is drawn: its sequence is promised for a seed, that of
    # choice() and shuffle() is not
    _check(variant, prompt)
    digest = hashlib.sha256(f"{variant}\0{seed}\0{prompt}".encode("utf-8", "surrogatepass")).digest()
    return Random(int.from_bytes(digest[:8], "big"))


def _check(variant: str, prompt: str) -> None:
    if not prompt:
        raise ValueError(f"{variant}: the prompt is empty; a task without prompts cannot be perturbed")


def _one_of(items: Sequence[Item], random: Random) -> Item:
    return items[int(random.random() * len(items))]


def _found(prompt: str, pattern: re.Pattern[str]) -> list[re.Match[str]]:
    """What matches outside the frame."""
    found: list[re.Match[str]] = []
    start = 0
    for frame in _FRAME.finditer(prompt):
        found += pattern.finditer(prompt, start, frame.start())
        start = frame.end()
    return [*found, *pattern.finditer(prompt, start)]


def _edited(prompt: str, edits: Sequence[tuple[tuple[int, int], str]]) -> str:
    parts, last = [], 0
    for (start, end), other in sorted(edits):
        parts += [prompt[last:start], other]
        last = end
    return "".join([*parts, prompt[last:]])


def _mistyped(word: str, random: Random) -> str:
    at = int(random.random() * len(word))
    before, letter, after = word[:at], word[at], word[at + 1 :]
    possible = [before + letter + letter + after]
    if letter.lower() in _NEIGHBOURS:
        key = _one_of(_NEIGHBOURS[letter.lower()], random)
        possible.append(before + (key.upper() if letter.isupper() else key) + after)
    if after and after[0] != letter:
        possible.append(before + after[0] + letter + after[1:])
    if len(word) > 2:
        possible.append(before + after)
    return _one_of(possible, random)


def _may_go(word: str) -> bool:
    plain = word.lower().strip(".,;:!?\"'()[]")
    return plain.isalpha() and plain not in _TURNING_WORDS


def _reframed(prompt: str, random: Random) -> str:
    """The prompt with other words for `Question:` and `Answer:`."""
    labels = {match[2] for match in _FRAME_LABEL.finditer(prompt)}
    own = next((label for label in ("Question", "Q") if label in labels), None)
    if own is None:
        return prompt
    question, answer = _one_of([frame for frame in FRAMES if frame[0] != f"{own}:"], random)
    cues = {"Question": question, "Q": question, "Answer": answer, "A": answer if own == "Q" else "A:"}
    return _FRAME_LABEL.sub(lambda match: match[1] + cues[match[2]], prompt)
