"""Which code of the kit a card takes."""

from __future__ import annotations

from pathlib import Path


def code_for(kit: Path, capability: tuple[int, int]) -> Path:
    """Return the file with the code for a card of a compute capability, (8, 6) for 8.6.

    That is machine code for the card or for an older one of its generation, else the newest PTX
    that is not newer than the card: a driver compiles none for an older card than it is for.

    Raises FileNotFoundError, which says what there is, if there is neither.
    """
    major, minor = capability
    alike = [kit / f"sm_{major}{lower}.cubin" for lower in range(minor, -1, -1)]
    texts = {int(file.stem.partition("_")[2]): file for file in kit.glob("compute_*.ptx")}
    older = [
        texts[number] for number in sorted(texts, reverse=True) if number <= 10 * major + minor
    ]
    found = [file for file in (*alike, *older) if file.exists()]
    if found:
        return found[0]
    there = sorted(file.name for file in kit.glob("*_*.*") if file.suffix in (".cubin", ".ptx"))
    raise FileNotFoundError(
        f"{kit} has no code for compute capability {major}.{minor}, only "
        f"{', '.join(there) or 'none at all'}: run make gpu-kit "
        f'ARGS="--capability {major}{minor}"'
    )
