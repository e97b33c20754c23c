"""Make compressor/demo/tasks/continuation.jsonl from the bundled held-out texts: which of four texts goes on?

`python benchmarks/make_demo_tasks.py`: the query is a passage, the right choice what follows it, the wrong ones what
follows other passages of the same text. Sentences of the evaluation windows may occur; calibration texts never do.
"""

import json
import random
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "compressor" / "demo"
ITEMS_A_TEXT, CHOICES = 100, 4
QUERY, CHOICE = (12, 40), (6, 16)  # words


def passages(text: str) -> list[tuple[str, str]]:
    """(query, what follows) from sentences in a row, in which no line breaks or lists stand in the way."""
    words = re.sub(r"\s+", " ", text).split(" ")
    found, position = [], 0
    while position + QUERY[1] + CHOICE[1] < len(words):
        query, rest = words[position : position + QUERY[1] - CHOICE[1]], words[position + QUERY[1] - CHOICE[1] :]
        ends = next((k for k in range(CHOICE[0], CHOICE[1]) if rest[k - 1][-1:] in ".!?;,:"), CHOICE[1])
        found.append((" ".join(query), " ".join(rest[:ends])))
        position += len(query) + ends
    return found


def main() -> None:
    lines = []
    for path in sorted((ROOT / "text" / "held_out").glob("*.txt")):
        draw = random.Random(path.stem)
        pairs = [pair for pair in passages(path.read_text(encoding="utf-8")) if len(set(pair[1].split())) > 3]
        for n in sorted(draw.sample(range(len(pairs)), ITEMS_A_TEXT)):
            query, right = pairs[n]
            others = draw.sample([pair[1] for k, pair in enumerate(pairs) if k != n], CHOICES - 1)
            gold = draw.randrange(CHOICES)
            choices = [*others[:gold], right, *others[gold:]]
            lines.append({"query": query, "choices": choices, "gold": gold, "domain": path.stem})
    out = ROOT / "tasks" / "continuation.jsonl"
    out.parent.mkdir(exist_ok=True)
    out.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    print(f"{out}: {len(lines)} items, {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
