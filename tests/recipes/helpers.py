"""Small local data; and the recipes' folder on the path, for the imports of the test modules (conftest.py comes first)."""

import sys
from pathlib import Path

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
if str(RECIPES) not in sys.path:  # as python puts it there for a script
    sys.path.insert(0, str(RECIPES))

WORDS = {"animal": ["cat", "dog", "horse"], "fruit": ["apple", "pear", "plum"]}


def write_csv(path: Path, rows: int, labels=("animal", "fruit"), header: str = "text,label") -> str:
    lines = [header]
    for i in range(rows):
        kind = i % 2
        words = list(WORDS.values())[kind]
        lines.append(f"the {words[i // 2 % 3]}s a {words[i // 6 % 3]},{labels[kind]}")
    path.write_text("\n".join(lines) + "\n")
    return str(path)
