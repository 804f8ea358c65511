"""JSON files that are read whole or not at all."""

import json
from typing import Any

import xxhash
from etils import epath

from ling_jax.files.buckets import Unreachable

CHECKSUM = "xxh3_64"  # key and algorithm: of a file's bytes, or of all other keys of the object that has it


def checksum(data: Any) -> str:
    """XXH3-64 of anything with a contiguous buffer, as 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(data)


def checksum_of_parts() -> Any:
    """The same of data that comes in parts: `update` it with each of them, in order; `hexdigest()` gives it."""
    return xxhash.xxh3_64()


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """A copy of a JSON object that carries its own checksum; see `read_sealed`."""
    return {**value, CHECKSUM: checksum(_canonical(value))}


def read_sealed(path: epath.Path) -> dict[str, Any]:
    """The JSON object in a file, without the checksum that `sealed` gave it.

    Raises:
      ValueError: naming the file, if it is missing, no JSON object, or changed.
    """
    value, has_checksum = read_perhaps_sealed(path)
    if not has_checksum:
        raise ValueError(f"{path} is damaged: it has lost the checksum it was written with")
    return value


def read_perhaps_sealed(path: epath.Path) -> tuple[dict[str, Any], bool]:
    """`read_sealed` of a file that an older version may have written without a checksum; and whether it has one."""
    value = read_json(path)
    stated = value.pop(CHECKSUM, None)
    if stated is not None and stated != checksum(_canonical(value)):
        raise ValueError(f"{path} is damaged: it does not have the checksum it was written with")
    return value, stated is not None


def read_json(path: Any) -> dict[str, Any]:
    """The JSON object in a file (any kind of path with `read_text`); ValueError naming the file if there is none."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except Unreachable:
        raise
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object; download or copy it again")
    return value


def _canonical(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
