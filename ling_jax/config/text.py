"""Tables as text."""

from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]], numbers: bool = False) -> str:
    """`rows` in aligned columns, two spaces apart; with `numbers`, all but the first column flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [f"{c:>{w}}" if numbers and i else f"{c:{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
