"""The zoo's results: one JSON object a line, numbers to four digits, null for what is not finite."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


def path_of(stage: str, folder: Path = FOLDER) -> Path:
    """The file of a stage."""
    return folder / f"{stage}.jsonl"


def rounded(value: Any) -> Any:
    """The value with every number cut to four digits."""
    if isinstance(value, bool) or value is None or isinstance(value, (int, str)):
        return value
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(held) for key, held in value.items()}
    return [rounded(held) for held in value]


def read(stage: str, folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """What is there of a stage, by the name of the configuration."""
    path = path_of(stage, folder)
    if not path.exists():
        return {}
    lines = path.read_text().splitlines()
    return {record["name"]: record for record in map(json.loads, lines)}


def append(stage: str, record: dict[str, Any], folder: Path = FOLDER) -> None:
    """Add a record to a stage, in one write."""
    folder.mkdir(parents=True, exist_ok=True)
    with path_of(stage, folder).open("a") as file:
        file.write(json.dumps(rounded(record), separators=(",", ":")) + "\n")
