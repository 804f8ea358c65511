"""The rotary embedding's settings, and how `config.json` has spelled them over the years.

Until version 4 of transformers `rope_theta` and `partial_rotary_factor` stand beside `rope_scaling`; version 5 has all
of them in `rope_parameters`, or only some. Every spelling is read; what is said twice must be the same.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ling_jax.config.checks import as_declared, check, check_at_least, check_types

PLACES = ("rope_scaling", "rope_parameters")  # objects of config.json
BESIDE = ("rope_theta", "partial_rotary_factor", "rotary_dim", "original_max_position_embeddings")  # or inside them


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """YaRN context extension (arXiv 2309.00071), with the key names of HF's `rope_scaling`."""

    factor: float  # positions the model is to have, over those it was trained on
    original_max_position_embeddings: int  # positions it was trained on
    beta_fast: float = 32.0  # dims that turn more often within those positions are kept
    beta_slow: float = 1.0  # dims that turn less often are interpolated
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None  # on cos and sin; by default it follows from the factor
    truncate: bool = True  # the ramp between fast and slow dims begins and ends at whole dims

    def __post_init__(self):
        check_types(self)
        check_at_least(self, 1, "factor", "original_max_position_embeddings")
        for name in ("beta_fast", "beta_slow"):
            check(getattr(self, name) > 0, f"{name} = {getattr(self, name)} must be positive")


SCALING_KEYS = {field.name for field in dataclasses.fields(RopeScaling)}


def read_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Reads `rope_theta`, `partial_rotary_factor`, `rotary_dim` and `rope_scaling` of a `config.json`, wherever it
    says it; None for what it does not say.

    Raises:
      ValueError: for another kind of scaling than YaRN, a key that is not known, or two places that disagree.
    """
    places = {name: _said(name, config.get(name)) for name in PLACES}
    places["config.json"] = {key: config[key] for key in BESIDE if config.get(key) is not None}
    told: dict[str, Any] = {}
    for name, place in places.items():
        for key, value in place.items():
            check(
                told.setdefault(key, value) == value,
                f"config.json says {key} twice, {told[key]!r} and {value!r} (in {name}): remove the wrong one",
            )
    rope = {key: told.get(key) for key in ("rope_theta", "partial_rotary_factor", "rotary_dim")}
    return rope | {"rope_scaling": _yarn(told, config) if told.get("rope_type") == "yarn" else None}


def _said(name: str, value: Any) -> dict[str, Any]:
    """The keys of one place that are not null, `type` under its newer name `rope_type`."""
    if value is None:
        return {}
    check(isinstance(value, Mapping), f"{name} = {value!r} in config.json must be an object or null")
    said = {key: entry for key, entry in value.items() if entry is not None}
    old = said.pop("type", None)
    kind = said.setdefault("rope_type", old) if old is not None else said.get("rope_type")
    check(old in (None, kind), f"{name} in config.json has type {old!r} and rope_type {kind!r}: remove the wrong one")
    check(
        kind in (None, "default", "yarn"),
        f"{name} type {kind!r}: only 'yarn' is implemented (spec 2.3), and 'default', which scales nothing",
    )
    unknown = sorted(said.keys() - SCALING_KEYS - {"rope_type", *BESIDE})
    check(
        not unknown,
        f"{name} in config.json has {', '.join(unknown)}, which this version does not know: remove what has no effect",
    )
    idle = sorted(said.keys() & SCALING_KEYS - set(BESIDE))
    check(
        kind == "yarn" or not idle,
        f"{name} in config.json has {', '.join(idle)}, but rope_type {kind!r}: say 'yarn', or remove them",
    )
    return said


def _yarn(told: Mapping[str, Any], config: Mapping[str, Any]) -> RopeScaling:
    check(
        "factor" in told,
        "rope_scaling lacks 'factor', or it is null: set it to the positions the model is to have over those it was "
        "trained on, such as 4.0",
    )
    values = {key: told[key] for key in told.keys() & SCALING_KEYS}
    values.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    for beta in ("beta_fast", "beta_slow"):  # 0 means "the default" in HF's code
        if not values.get(beta, 1):
            del values[beta]
    return RopeScaling(**as_declared(RopeScaling, values))


def scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """`rope_scaling` of a `config.json`; what every reader takes for granted is left out."""
    if scaling is None:
        return None
    values = {key: value for key, value in dataclasses.asdict(scaling).items() if value is not None}
    if scaling.truncate:
        del values["truncate"]
    return {"rope_type": "yarn", **values}


def rope_changes(original: Mapping[str, Any], changed: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `config.json` that must follow where the rotary embedding was changed, so that no two places
    disagree.

    Args:
      original: the file as it was.
      changed: its fields that are new.
      rope: all of today's `rope_theta`, `partial_rotary_factor`, `rotary_dim` and `rope_scaling`, in HF's form.
    """
    if not changed.keys() & rope.keys():
        return {}
    follow: dict[str, Any] = {}
    if original.get("original_max_position_embeddings") is not None:
        length = (rope["rope_scaling"] or {}).get("original_max_position_embeddings")
        follow["original_max_position_embeddings"] = length
    if original.get("rope_parameters") is not None:
        kept = {key: rope[key] for key in ("partial_rotary_factor", "rotary_dim") if key in original["rope_parameters"]}
        scaling = rope["rope_scaling"] or {"rope_type": "default"}
        follow["rope_parameters"] = {**scaling, "rope_theta": rope["rope_theta"], **kept}
        follow["rope_theta"] = rope["rope_theta"]
        follow["rope_scaling"] = rope["rope_scaling"]
    return follow
